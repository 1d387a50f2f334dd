"""A block on its way to the store, in a thread, while its worker goes on with the next one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from workers.clock import Clock, timed

Tensors = dict[str, Tensor]


class Writer:
    """One block at a time; how it ended is told when that is asked for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._latest: Future[Any] | None = None

    def begin(self, tensors: Tensors, write: Callable[[Tensors], Any]) -> None:
        """Write tensors, of which copies are on the host before a thread begins with them."""
        with self._clock.spent("write"):
            copies, copied = _on_host(tensors)

        def work() -> tuple[Any, float]:
            if copied is not None:
                copied.synchronize()
            return timed(write, copies)

        self.settle()
        self._latest = self._pool.submit(work)

    def settle(self) -> Any:
        """What the latest write gave, once it has ended; its error, if it failed."""
        latest, self._latest = self._latest, None
        return None if latest is None else self._clock.awaited("write", latest)


def _on_host(tensors: Tensors) -> tuple[Tensors, Any]:
    """The tensors as they are now, and what to wait for before they are read.

    From an accelerator they go to pinned memory, in the order of its work and with no wait here.
    """
    devices = {t.device for t in tensors.values() if t.device.type != "cpu"}
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.contiguous()
        if tensor.device.type != "cpu":
            copies[name] = torch.empty_like(copies[name], device="cpu", pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
    if not devices:
        return copies, None
    copied = torch.Event(next(iter(devices)))
    copied.record()
    return copies, copied
