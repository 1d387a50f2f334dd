"""Where tasks run. The driver knows this protocol; ray_executor.py is one way to fulfil it."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.scheduler import Assignment
from quantcore.errors import QuantfleetError
from workers.plan import Plan
from workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one task: its summary, or the error it raised.

    `missing` names earlier assignments whose results could not be had: no fault of this one.
    """

    assignment: str
    worker: int
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A worker that came after the first ones. Numbers are never used twice."""

    worker: int


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker is gone, and why."""

    worker: int
    error: Exception
    parts_kept: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """No worker can be had from a machine, and why."""

    machine: str
    error: Exception


News = Result | Arrival | Loss | Refusal
Progress = Callable[[str, int, int], None]  # a running assignment, and how many of how many steps


class Executor(Protocol):
    on_progress: Progress

    def present(self) -> tuple[int, ...]:
        """The workers that are there now."""
        ...

    def speed(self, worker: int) -> float:
        """How fast a worker is beside the others, as measured when it started."""
        ...

    def submit(self, worker: int, assignment: Assignment) -> None: ...
    def next_news(self) -> News:
        """Wait for something to happen. Raises ResourceError if nothing can: nobody is there."""
        ...

    def release(self, assignment: str) -> None: ...
    def close(self) -> None: ...


def unheard(task: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


class InProcessExecutor:
    """Any number of workers in this very process, one task after the other.

    For tests, and for machines without Ray. Workers share nothing but torch's settings.
    """

    def __init__(self, plan: Plan, devices: Sequence[str]) -> None:
        self.on_progress: Progress = unheard
        self._running = ""
        self._workers = {
            number: Worker(plan, device, self._tell) for number, device in enumerate(devices)
        }
        self._queue: deque[tuple[int, Assignment]] = deque()
        self._parts: dict[str, tuple[Any, ...]] = {}

    def present(self) -> tuple[int, ...]:
        return tuple(self._workers)

    def speed(self, worker: int) -> float:
        return self._workers[worker].speed

    def submit(self, worker: int, assignment: Assignment) -> None:
        self._queue.append((worker, assignment))

    def next_news(self) -> News:
        worker, assignment = self._queue.popleft()
        inputs = tuple(self._parts[source][part] for source, part in assignment.inputs)
        self._running = assignment.id
        start = time.perf_counter()
        try:
            outcome = self._workers[worker].run(assignment.task, inputs)
        except QuantfleetError as error:
            return Result(assignment.id, worker, error=error)
        assert len(outcome.parts) == assignment.parts
        if outcome.parts:
            self._parts[assignment.id] = outcome.parts
        return Result(assignment.id, worker, time.perf_counter() - start, outcome.summary)

    def release(self, assignment: str) -> None:
        self._parts.pop(assignment, None)

    def close(self) -> None:
        self._queue.clear()
        self._parts.clear()
        for worker in self._workers.values():
            worker.close()

    def _tell(self, done: int, total: int) -> None:
        self.on_progress(self._running, done, total)
