"""A model's source, with one block's tensors on the device and the next ones on their way there.

A block's weights are wanted several times: for its forward, for each of its solves, and for what
of it stays as it is. On an accelerator they are sent there once. While the device is busy with
them, a thread reads what is wanted next into memory that the device copies from by itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from workers.clock import Clock, timed
from workers.sources import ModelSource

Tensors = dict[str, Tensor]


class ResidentSource:
    """As the source it stands before; what it holds is read from the device."""

    def __init__(self, source: ModelSource, device: torch.device, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._device = device
        self._held: Tensors = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming: tuple[frozenset[str], Future[tuple[Tensors, float]]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def hold(self, names: Iterable[str], coming: Iterable[str] = ()) -> None:
        """Have these tensors on the device, and no others; begin to read those to come."""
        wanted, later = frozenset(names), frozenset(coming)
        if wanted != self._held.keys():
            self._held = {}
            read = self._taken(wanted)
            self._held = {n: t.to(self._device, non_blocking=True) for n, t in read.items()}
        if later and (self._coming is None or self._coming[0] != later):
            self._coming = (later, self._reader.submit(timed, self._pinned, later))

    def release(self) -> None:
        self._held = {}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        elsewhere = []
        for name in names:
            if name in self._held:
                yield name, self._held[name]
            else:
                elsewhere.append(name)
        yield from self._source.read(elsewhere)

    def _taken(self, wanted: frozenset[str]) -> Mapping[str, Tensor]:
        """What was read ahead, if it is what is wanted now; an error of the reader's is ours."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == wanted:
            return self._clock.awaited("read", coming[1])
        return dict(self._source.read(sorted(wanted)))

    def _pinned(self, names: frozenset[str]) -> Tensors:
        return {name: tensor.pin_memory() for name, tensor in self._source.read(sorted(names))}
