"""Where a worker's time goes: every moment of it belongs to one part of one block.

    read, forward, hessian, factor, solve, pack, write; and waiting, between tasks

A clock keeps marks. A mark says what the time from it on belongs to, until the next mark: so time
is never counted twice (the Hessian's is taken out of the forward that it happens in), and all
parts together are all the time there was. The time between two tasks is waiting, for inputs or
for other workers, and belongs to the block of the task that was waited for.

A CPU's marks are moments of the host. An accelerator works behind the host, so there a mark is an
event in its own stream: between two of them lies what the device took, with the time it stood idle
because the host was late. Nobody waits for an event. It is read once it has passed, with a later
task or, for what is left at the end, by `Account`; blocks stay apart, however late that is.

What a thread does beside all this (reading ahead, writing behind) is no time of the worker's. Where
its result is waited for, the wait is; the rest of the thread's time is told as hidden.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from workers.sources import ModelSource
from workers.tasks import (
    Advance,
    Boundary,
    Collect,
    CopyOutside,
    Drop,
    Embed,
    Hand,
    Keep,
    Load,
    Publish,
    Quantize,
    Reduce,
    Round,
    Save,
    Settle,
    Solve,
    Sweep,
    Take,
    Task,
)

Part = Literal["read", "forward", "hessian", "factor", "solve", "pack", "write", "waiting"]
T = TypeVar("T")

# What a task's time is where nothing in it says otherwise. Other tasks are no block's work.
_PART_OF: dict[type[Task], Part] = {
    Embed: "forward",
    Hand: "write",
    Take: "read",
    Drop: "write",
    Keep: "write",
    Load: "read",
    Sweep: "write",
    Collect: "forward",
    Reduce: "hessian",
    Solve: "solve",
    Save: "write",
    Publish: "pack",
    Settle: "write",
    Advance: "forward",
    Boundary: "forward",
    Round: "solve",
    Quantize: "solve",
    CopyOutside: "solve",
}
_MANY = 1024  # marks that are kept before it is looked which of them have passed


class Ticks(Protocol):
    """Moments of the host or of a device; a device's may not have come yet."""

    def now(self) -> Any: ...
    def passed(self, moment: Any) -> bool: ...
    def wait(self, moment: Any) -> None: ...
    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments that have passed."""
        ...


class HostTicks:
    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceTicks:
    """Moments between the things that an accelerator was given to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def passed(self, moment: torch.Event) -> bool:
        return moment.query()

    def wait(self, moment: torch.Event) -> None:
        moment.synchronize()

    def seconds(self, start: torch.Event, end: torch.Event) -> float:
        return start.elapsed_time(end) / 1e3


@dataclass(slots=True)
class _Mark:
    at: Any
    block: int | None  # None: of none, such as embeddings
    part: Part | None  # None: not counted
    beside: float = 0.0  # that a thread worked for what is waited for


class Clock:
    def __init__(self, device: torch.device, ticks: Ticks | None = None) -> None:
        on_host = device.type == "cpu"
        self._ticks = ticks or (HostTicks() if on_host else DeviceTicks(device))
        self._marks: deque[_Mark] = deque()
        self._block: int | None = None
        self._part: Part | None = None
        self._seconds: dict[tuple[int | None, Part], float] = {}
        self._hidden: dict[tuple[int | None, Part], float] = {}

    @contextlib.contextmanager
    def task(self, task: Task) -> Iterator[None]:
        """All of a task; what came before it was waiting for it."""
        part, block = _PART_OF.get(type(task)), getattr(task, "block", None)
        if self._part == "waiting":
            self._marks[-1].block = block
            self._marks[-1].part = part and "waiting"
        self._turn(block, part)
        try:
            yield
        finally:
            self._turn(None, part and "waiting")

    @contextlib.contextmanager
    def spent(self, part: Part, block: int | None = None) -> Iterator[None]:
        """A part of a task, which may hold others; `block` where the task has none of its own."""
        before = self._block, self._part
        if self._part is not None:
            self._turn(self._block if block is None else block, part)
        try:
            yield
        finally:
            self._turn(*before)

    def awaited(self, part: Part, future: "Future[tuple[T, float]]") -> T:
        """What a thread made by `timed`; only the wait for it counts as spent."""
        before = self._block, self._part
        if self._part is None:
            return future.result()[0]
        self._mark(self._block, part)
        try:
            result, self._marks[-1].beside = future.result()
        finally:
            self._mark(*before)
        return result

    def told(self, *, wait: bool = False) -> list[dict[str, Any]]:
        """What has passed since this was asked last, by block: seconds of each part."""
        if wait and self._marks:
            self._ticks.wait(self._marks[-1].at)
        self._add_up()
        rows: dict[int | None, dict[str, Any]] = {}
        for name, found in (("seconds", self._seconds), ("hidden", self._hidden)):
            for (block, part), seconds in found.items():
                row = rows.setdefault(block, {"block": block, "seconds": {}, "hidden": {}})
                row[name][part] = seconds
            found.clear()
        return list(rows.values())

    def _turn(self, block: int | None, part: Part | None) -> None:
        if (block, part) != (self._block, self._part):
            self._mark(block, part)

    def _mark(self, block: int | None, part: Part | None) -> None:
        self._block, self._part = block, part
        self._marks.append(_Mark(self._ticks.now(), block, part))
        if len(self._marks) % _MANY == 0:
            self._add_up()

    def _add_up(self) -> None:
        marks = self._marks
        while len(marks) > 1 and self._ticks.passed(marks[1].at):
            mark = marks.popleft()
            if mark.part is None:
                continue
            seconds = max(self._ticks.seconds(mark.at, marks[0].at), 0.0)
            key = mark.block, mark.part
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds
            if mark.beside > seconds:
                self._hidden[key] = self._hidden.get(key, 0.0) + mark.beside - seconds


def timed(work: Callable[..., T], *args: Any) -> tuple[T, float]:
    """What a thread did, and how long it took."""
    start = time.perf_counter()
    result = work(*args)
    return result, time.perf_counter() - start


class TimedSource:
    """As the source it stands before; reading from it is told to a clock."""

    def __init__(self, source: ModelSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = iter(self._source.read(names))
        while True:
            with self._clock.spent("read"):
                found = next(tensors, None)
            if found is None:
                return
            yield found
