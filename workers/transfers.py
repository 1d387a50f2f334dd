"""Copies between an accelerator and the host's memory, beside what the accelerator computes.

A device copies by itself from and to pinned memory alone. So a thread for each way moves pieces
between ordinary memory and two pinned buffers, and a stream for each way moves them on: while one
piece is on its way, the next is copied. What is computed waits for a copy only where it needs it,
and a copy only for what was computed before it was asked for. So while one micro-batch is computed
the next one comes, though it be of another chunk (held.py), and the last two go.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 32 << 20  # of a pinned buffer
PINNED_BYTES = 4 * PIECE_BYTES
MOST_SENT = 2  # tensors on their way to the host: whoever sends another one waits


@dataclass(frozen=True, slots=True)
class Coming:
    kept: Tensor  # on the host
    _there: Tensor
    _done: Future[Any]  # the event after the last piece

    def wait(self) -> Tensor:
        """The same values on the device, for what is computed from now on."""
        self._done.result().wait(_current(self._there.device))
        return self._there


class Transfers:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = _Lane(device), _Lane(device)
        self._sent: deque[tuple[Tensor, Future[None]]] = deque()

    def fetch(self, kept: Tensor) -> Coming:
        """Begin to bring a tensor to the device. What is computed later does not delay it."""
        there = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        begun = _marked(self._device)  # whose memory it was before may still be computed with
        first = next((done for sent, done in self._sent if sent is kept), None)

        def copy() -> Any:
            if first is not None:
                first.result()
            return self._inward.bring(kept, there, begun)

        return Coming(kept, there, self._inward.thread.submit(copy))

    def send(self, tensor: Tensor, kept: Tensor) -> None:
        """Begin to fill `kept` with what the device has; `settle` or `fetch` see to the end."""
        while len(self._sent) >= MOST_SENT:
            self._sent.popleft()[1].result()
        tensor, begun = tensor.contiguous(), _marked(self._device)
        job = self._outward.thread.submit(self._outward.take, tensor, kept, begun)
        self._sent.append((kept, job))

    def settle(self) -> None:
        """All that was sent is there."""
        while self._sent:
            self._sent.popleft()[1].result()


class _Lane:
    """One way: a stream, and the two buffers that its thread uses in turn."""

    def __init__(self, device: torch.device) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._stream = torch.Stream(device)
        self._buffers = deque((_pinned(PIECE_BYTES), torch.Event(device)) for _ in range(2))

    def bring(self, kept: Tensor, there: Tensor, begun: Any) -> Any:
        self._stream.wait_event(begun)
        for source, target in _pieces(kept, there):
            buffer, free = self._next()
            free.synchronize()
            part = buffer[: source.numel()]
            part.copy_(source)
            with self._stream:
                target.copy_(part, non_blocking=True)
            free.record(self._stream)
        return self._stream.record_event()

    def take(self, tensor: Tensor, kept: Tensor, begun: Any) -> None:
        self._stream.wait_event(begun)
        underway: deque[tuple[Any, Tensor, Tensor]] = deque()
        for source, target in _pieces(tensor, kept):
            if len(underway) == len(self._buffers):
                _put_down(*underway.popleft())
            buffer, arrived = self._next()
            part = buffer[: source.numel()]
            with self._stream:
                part.copy_(source, non_blocking=True)
            arrived.record(self._stream)
            underway.append((arrived, target, part))
        while underway:
            _put_down(*underway.popleft())

    def _next(self) -> tuple[Tensor, Any]:
        self._buffers.rotate()
        return self._buffers[0]


def _put_down(arrived: Any, target: Tensor, part: Tensor) -> None:
    arrived.synchronize()
    target.copy_(part)


def _pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as bytes, a buffer's worth at a time."""
    flat = (tensor.view(-1).view(torch.uint8) for tensor in (source, target))
    return zip(*(torch.split(tensor, PIECE_BYTES) for tensor in flat), strict=True)


def _marked(device: torch.device) -> Any:
    return _current(device).record_event()


def _current(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device)


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
