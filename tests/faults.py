"""Workers in this process that are killed at given points, with or without their results."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.executors import Arrival, InProcessExecutor, Loss, News, Result
from orchestrator.scheduler import Assignment
from quantcore.errors import ResourceError
from workers.plan import Plan
from workers.worker import Worker

PHASES = ("Embed", "Advance", "Collect", "Solve", "Publish")


@dataclass(frozen=True, slots=True)
class Kill:
    """The end of whoever first begins this step of this block; once."""

    phase: str
    block: int  # of no meaning for Embed and Boundary
    done: bool  # whether the step still took effect: its answer is lost all the same
    parts: str  # of the worker's results: "kept", "gone", or "gone unnoticed"


def schedule(seed: int, blocks: int) -> list[Kill]:
    """Three to six kills at seeded points, early and late."""
    chance = random.Random(seed)
    return [
        Kill(
            chance.choice(PHASES),
            chance.randrange(blocks),
            chance.random() < 0.5,
            chance.choice(("kept", "gone", "gone unnoticed")),
        )
        for _ in range(chance.randint(3, 6))
    ]


class KillingExecutor(InProcessExecutor):
    """A replacement comes for each worker that is killed, a few tasks later."""

    def __init__(self, plan: Plan, workers: int, kills: Sequence[Kill]) -> None:
        super().__init__(plan, ["cpu"] * workers)
        self.kills = list(kills)
        self.killed: list[Kill] = []
        self._plan = plan
        self._made: dict[str, int] = {}  # results by the worker that made them
        self._hired = workers
        self._due: list[int] = []  # tasks until each replacement comes

    def next_news(self) -> News:
        self._due = [tasks - 1 for tasks in self._due]
        if self._due and (self._due[0] <= 0 or not self._queue):
            del self._due[0]
            self._workers[self._hired] = Worker(self._plan, "cpu", self._tell)
            self._hired += 1
            return Arrival(self._hired - 1)
        worker, assignment = self._queue[0]
        missing = tuple(sorted({s for s, _ in assignment.inputs if s not in self._parts}))
        kill = next((kill for kill in self.kills if _meets(kill, assignment)), None)
        if kill is None and missing:
            self._queue.popleft()
            error = ResourceError("a result is gone")
            return Result(assignment.id, worker, error=error, missing=missing)
        if kill is None:
            self._made[assignment.id] = worker
            return super().next_news()
        if kill.done and not missing:
            super().next_news()
            self._parts.pop(assignment.id, None)
        return self._kill(worker, kill)

    def release(self, assignment: str) -> None:
        self._parts.pop(assignment, None)

    def _kill(self, worker: int, kill: Kill) -> Loss:
        self.kills.remove(kill)
        self.killed.append(kill)
        del self._workers[worker]
        self._queue = type(self._queue)(item for item in self._queue if item[0] != worker)
        if kill.parts != "kept":
            gone = {name for name, maker in self._made.items() if maker == worker}
            self._parts = {n: parts for n, parts in self._parts.items() if n not in gone}
        self._due.append(4)
        return Loss(worker, ResourceError("killed"), parts_kept=kill.parts != "gone")


def _meets(kill: Kill, assignment: Assignment) -> bool:
    task = assignment.task
    if type(task).__name__ != kill.phase:
        return False
    return kill.phase in {"Embed", "Boundary"} or getattr(task, "block", None) == kill.block
