"""Which norms hand their output to one LinearGroup and to nothing else.

Found by running the block on tensors without data: a norm's output must be the very tensor that
the group's linears are handed, and no operation outside those linears may touch it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NormWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, a forward of the block tells who reads its norms' outputs."""

    def __init__(self, block: nn.Module, readers: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # by id, which the tensor keeps unique
        self._touched: set[str] = set()
        self._inside = 0
        self._handles = [
            module.register_forward_hook(self._note(name))
            for name, module in block.named_modules()
            if may_be_norm(module)
        ]
        for reader in readers:
            self._handles.append(reader.register_forward_pre_hook(self._enter))
            self._handles.append(reader.register_forward_hook(self._leave))

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            with self:
                yield
        finally:
            for handle in self._handles:
                handle.remove()

    def norm_of(self, x: Tensor) -> str | None:
        """The norm whose output a tensor is, if linears alone read it."""
        name, _ = self._outputs.get(id(x), (None, None))
        return None if name in self._touched else name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self._inside:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._outputs:
                    self._touched.add(self._outputs[id(leaf)][0])
        return func(*args, **(kwargs or {}))

    def _note(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if any(known == name for known, _ in self._outputs.values()):  # called twice
                self._touched.add(name)
            self._outputs[id(output)] = (name, output)

        return hook

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1


def may_be_norm(module: nn.Module) -> bool:
    """A module with a weight for every channel, perhaps a bias, and nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or any(module.children()) or any(module.buffers()):
        return False
    return all(n in ("weight", "bias") and p.shape == weight.shape for n, p in parameters.items())
