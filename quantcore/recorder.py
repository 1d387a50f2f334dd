"""What the linears of any module are handed, recorded from forward calls as they come.

    recorder = Recorder(model)
    with recorder:
        for batch in examples:
            model(batch)
    h_II = recorder["layers.0.q_proj"].moments.mean()

Hooks add each linear's input to its statistics: the Hessian's sum (moments.py), and ranges with a
sample of tokens (ranges.py). Linears that are handed one tensor, such as q, k and v, share them.
All statistics are kept at once, on the devices of the inputs; a filter takes a model in parts.

Shape suffixes: T = tokens, I = in_features.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantcore.moments import Moments
from quantcore.ranges import Ranges


@dataclass(slots=True)
class InputStatistics:
    """Of the linears that were always handed the same tensors; what was not wanted is None."""

    linears: tuple[str, ...]  # in the order of the forward
    in_features: int
    moments: Moments | None
    ranges: Ranges | None
    calls: Counter[int] = field(default_factory=Counter)  # by their number of tokens


@dataclass(slots=True)
class _Group:
    """Linears that share statistics, led by the one whose inputs are added."""

    statistics: InputStatistics
    calls: int = 0
    latest: Callable[[], Tensor | None] = lambda: None  # the leader's last input, if it lives
    version: int = 0  # of that tensor: it may be written over
    followed: dict[str, int] = field(default_factory=dict)  # each other linear's calls


class Recorder(Mapping[str, InputStatistics]):
    """Statistics by the name of the linear, for those that were called within `with`.

    `linears` says, by name and module, which modules to watch (by default each nn.Linear); they
    must take one tensor, (..., in_features). `sample_rows` tokens of each call go into the sample
    of the ranges, so that it grows with the calls, up to `most_rows` if that is said.

    Raises ValueError if there is no such linear, and when linears that shared an input once are
    handed different ones later: `share=False` gives each its own statistics.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Callable[[str, nn.Module], bool] = lambda _, module: isinstance(module, nn.Linear),
        *,
        moments: bool = True,
        ranges: bool = True,
        sample_rows: int = 4,
        most_rows: int | None = None,
        share: bool = True,
    ) -> None:
        self._watched = {name: m for name, m in module.named_modules() if linears(name, m)}
        if not self._watched:
            raise ValueError(f"{type(module).__name__} has no linear to record: see `linears`")
        if sample_rows < 1 or not (moments or ranges):
            raise ValueError("record moments or ranges, with sample_rows of 1 or more")
        self._wants_moments, self._wants_ranges = moments, ranges
        self._sample_rows, self._most_rows = sample_rows, most_rows
        self._share = share
        self._groups: dict[str, _Group] = {}  # by each linear's name
        self._leaders: list[str] = []  # in the order of the forward
        self._mask: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        assert not self._handles, "already recording"
        for name, module in self._watched.items():
            hook = self._hook(name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            for group in self._groups.values():
                self._refuse_left_behind(group)

    @contextlib.contextmanager
    def only(self, mask: Tensor) -> Iterator[None]:
        """Within it, only tokens where `mask` is True count.

        `mask` is bool, of as many elements as the inputs of the linears have tokens, in their
        order: (batch, length) for inputs (batch, length, in_features).
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask of tokens is bool, not {mask.dtype}: write mask.bool()")
        self._mask = mask.flatten()
        try:
            yield
        finally:
            self._mask = None

    def __getitem__(self, name: str) -> InputStatistics:
        if name in self._groups:
            return self._groups[name].statistics
        why = "was not called" if name in self._watched else "is no linear that is watched"
        raise KeyError(f"'{name}' {why}")

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def groups(self) -> list[InputStatistics]:
        """Each once, however many linears share them; in the order of the forward."""
        return [self._groups[name].statistics for name in self._leaders]

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else next(iter(kwargs.values())))

        # a module may be compiled, and statistics are not
        return torch.compiler.disable(add)  # type: ignore[no-untyped-call]

    def _see(self, name: str, x: Tensor) -> None:
        group = self._groups.get(name)
        if group is None:
            group = self._shared(x) if self._share else None
            if group is None:
                group = self._new(name, x)
            else:
                group.followed[name] = 0
                group.statistics.linears += (name,)
            self._groups[name] = group
        if name in group.followed:
            group.followed[name] += 1
            if group.followed[name] != group.calls or not _is_latest(group, x):
                self._refuse(name, group)
            return
        self._refuse_left_behind(group)
        self._add(name, group, x)

    def _shared(self, x: Tensor) -> _Group | None:
        """The group that was handed this very tensor, and nothing before it."""
        fresh = (g for n in self._leaders if (g := self._groups[n]).calls == 1)
        return next((group for group in fresh if _is_latest(group, x)), None)

    def _new(self, name: str, x: Tensor) -> _Group:
        width = x.shape[-1]
        zeros_I = torch.zeros(width, device=x.device)
        moments = Moments(torch.zeros(width, width, device=x.device))
        ranges = Ranges(zeros_I, zeros_I, torch.zeros(0, width, device=x.device), self._sample_rows)
        self._leaders.append(name)
        return _Group(
            InputStatistics(
                (name,),
                width,
                moments if self._wants_moments else None,
                ranges if self._wants_ranges else None,
            )
        )

    def _add(self, name: str, group: _Group, x: Tensor) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1])
        if len(x_TI):  # experts may be called with the tokens of nobody
            group.statistics.calls[len(x_TI)] += 1
        if self._mask is not None:
            if len(self._mask) != len(x_TI):
                raise ValueError(
                    f"the mask is for {len(self._mask)} tokens, and '{name}' is handed {len(x_TI)}"
                )
            x_TI = x_TI[self._mask.to(x_TI.device)]
        group.calls += 1
        group.latest, group.version = weakref.ref(x), _version(x)
        ranges = group.statistics.ranges
        if ranges is not None and self._most_rows is not None:
            ranges.rows = min(self._sample_rows, self._most_rows - len(ranges.sample_SI))
        for statistic in (group.statistics.moments, ranges):
            if statistic is not None:
                statistic.add(x_TI)

    def _refuse_left_behind(self, group: _Group) -> None:
        for name, calls in group.followed.items():
            if calls != group.calls:
                self._refuse(name, group)

    def _refuse(self, name: str, group: _Group) -> None:
        leader = group.statistics.linears[0]
        raise ValueError(
            f"'{name}' was handed the same tensors as '{leader}', and now is not: what is recorded "
            "of them is of no use; record again with share=False"
        )


def _is_latest(group: _Group, x: Tensor) -> bool:
    return group.latest() is x and group.version == _version(x)


def _version(x: Tensor) -> int:
    """How often a tensor was written to; not counted in inference mode."""
    return 0 if x.is_inference() else x._version
