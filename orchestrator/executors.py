"""Where tasks run. The driver knows this protocol; ray_executor.py is one way to fulfil it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.graph import Node
from quantcore.errors import QuantfleetError
from workers.plan import Plan
from workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one task: its summary, or the error it raised, or the loss of its worker."""

    task: str
    worker: int
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    worker_lost: bool = False


class Executor(Protocol):
    workers: int

    def submit(self, worker: int, node: Node) -> None: ...
    def next_result(self) -> Result: ...
    def release(self, task: str) -> None: ...
    def close(self) -> None: ...


class InProcessExecutor:
    """Any number of workers in this very process, one task after the other.

    For tests, and for machines without Ray. Workers share nothing but torch's settings.
    """

    def __init__(self, plan: Plan, devices: Sequence[str]) -> None:
        self.workers = len(devices)
        self._workers = [Worker(plan, device) for device in devices]
        self._queue: deque[tuple[int, Node]] = deque()
        self._parts: dict[str, tuple[Any, ...]] = {}

    def submit(self, worker: int, node: Node) -> None:
        self._queue.append((worker, node))

    def next_result(self) -> Result:
        import time

        worker, node = self._queue.popleft()
        inputs = tuple(self._parts[task][part] for task, part in node.inputs)
        start = time.perf_counter()
        try:
            outcome = self._workers[worker].run(node.task, inputs)
        except QuantfleetError as error:
            return Result(node.id, worker, error=error)
        self._parts[node.id] = outcome.parts
        return Result(node.id, worker, time.perf_counter() - start, outcome.summary)

    def release(self, task: str) -> None:
        del self._parts[task]

    def close(self) -> None:
        self._queue.clear()
        self._parts.clear()
