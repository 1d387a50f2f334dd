"""Who does what next: a pure state machine, with no clock and no I/O.

    handle(event) -> [instruction, ...]

A task is WAITING until all it waits for is FINISHED, then READY until a worker that may do it is
free, then RUNNING. What a result's parts are kept for is counted, and a part is released when its
last reader has finished. Any event that the table does not know is a bug of ours.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from orchestrator.graph import Node


class State(Enum):
    WAITING = auto()
    READY = auto()
    RUNNING = auto()
    FINISHED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class Started:
    """The workers are there."""


@dataclass(frozen=True, slots=True)
class Finished:
    task: str


@dataclass(frozen=True, slots=True)
class Failed:
    task: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker: int


Event = Started | Finished | Failed | WorkerLost


@dataclass(frozen=True, slots=True)
class Run:
    task: str
    worker: int


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody will read the parts of this task's result any more."""

    task: str


@dataclass(frozen=True, slots=True)
class Stop:
    """No more instructions will come: all is finished, or something failed."""

    complete: bool


Instruction = Run | Release | Stop

_NEXT = {
    (State.WAITING, "released"): State.READY,
    (State.READY, "dealt"): State.RUNNING,
    (State.RUNNING, "finished"): State.FINISHED,
    (State.RUNNING, "failed"): State.FAILED,
}


class Scheduler:
    def __init__(self, nodes: Sequence[Node], workers: int) -> None:
        self._nodes = {node.id: node for node in nodes}
        assert len(self._nodes) == len(nodes), "task ids must differ"
        self._rank = {node.id: rank for rank, node in enumerate(nodes)}
        self._state = dict.fromkeys(self._nodes, State.WAITING)
        self._missing = {node.id: len(_needs(node)) for node in nodes}
        self._waiters: dict[str, list[str]] = defaultdict(list)
        self._readers: Counter[str] = Counter()
        self._ready: list[str] = []
        self._unfinished = len(nodes)
        self._free = list(range(workers))
        self._stopped = False
        for node in nodes:
            for need in _needs(node):
                assert need in self._nodes, f"{node.id} waits for {need}, which does not exist"
                self._waiters[need].append(node.id)
            self._readers.update({task for task, _ in node.inputs})
        self._running: dict[str, int] = {}

    def state(self, task: str) -> State:
        return self._state[task]

    def handle(self, event: Event) -> list[Instruction]:
        if self._stopped:
            return []
        match event:
            case Started():
                for task in self._nodes:
                    if self._missing[task] == 0:
                        self._release(task)
                released: list[Instruction] = []
            case Finished(task):
                released = self._finish(task)
            case Failed(task):
                self._move(task, "failed")
                return self._stop(complete=False)
            case WorkerLost(_):
                return self._stop(complete=False)
        if self._unfinished == 0:
            return [*released, *self._stop(complete=True)]
        return [*released, *self._deal()]

    def _finish(self, task: str) -> list[Instruction]:
        self._move(task, "finished")
        self._unfinished -= 1
        self._free.append(self._running.pop(task))
        for waiter in self._waiters.pop(task, []):
            self._missing[waiter] -= 1
            if self._missing[waiter] == 0:
                self._release(waiter)
        instructions: list[Instruction] = []
        for read in sorted({source for source, _ in self._nodes[task].inputs}):
            self._readers[read] -= 1
            if self._readers[read] == 0:
                instructions.append(Release(read))
        return instructions

    def _deal(self) -> list[Instruction]:
        """Give each free worker the task that only it can do, else the dearest that anyone can.

        Equal tasks go in the order of the graph, so that a schedule can be told beforehand.
        """
        instructions: list[Instruction] = []
        for worker in sorted(self._free):
            mine = [t for t in self._ready if self._nodes[t].worker in (worker, None)]
            if not mine:
                continue
            task = min(mine, key=self._urgency)
            self._ready.remove(task)
            self._free.remove(worker)
            self._move(task, "dealt")
            self._running[task] = worker
            instructions.append(Run(task, worker))
        assert self._running or not self._unfinished, "tasks are left and none can run"
        return instructions

    def _urgency(self, task: str) -> tuple[bool, float, int]:
        node = self._nodes[task]
        return node.worker is None, -node.cost, self._rank[task]

    def _release(self, task: str) -> None:
        self._move(task, "released")
        self._ready.append(task)

    def _stop(self, *, complete: bool) -> list[Instruction]:
        self._stopped = True
        return [Stop(complete)]

    def _move(self, task: str, cause: str) -> None:
        self._state[task] = _NEXT[self._state[task], cause]


def _needs(node: Node) -> set[str]:
    return {*node.after, *(task for task, _ in node.inputs)}
