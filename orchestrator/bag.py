"""Tasks that stand for themselves: any worker, any order, again if a worker is lost.

Blocks that are rounded without texts are such: nothing ties neighbours together, and dealing late
balances better than runs of blocks fixed early, which is why they have no shards.
"""

from collections.abc import Collection, Mapping

from orchestrator.scheduler import Assignment
from workers.tasks import Task

_AGAIN = "~"


def name_of(assignment: Assignment) -> str:
    """The task's own name, whichever try it was."""
    return assignment.id.partition(_AGAIN)[0]


class Bag:
    """The tasks by name, dealt in the order given. None of them has parts that others read.

    `heavy` ones are not given to a worker that takes longer for one than the fastest for all.
    `alone` ones are given one at a time, to whichever worker: others would disturb them.
    """

    def __init__(
        self, tasks: Mapping[str, Task], *, heavy: bool = False, alone: bool = False
    ) -> None:
        self._left = dict(tasks)
        self._heavy = heavy
        self._alone = alone
        self._speeds: dict[int, float] = {}
        self._tries: dict[str, int] = {}  # of those that came back
        self._running: dict[str, tuple[str, Task]] = {}

    def joined(self, worker: int, speed: float) -> None:
        self._speeds[worker] = speed

    def lost(self, worker: int, *, parts_kept: bool) -> list[str]:
        self._speeds.pop(worker, None)
        return []

    def offer(self, worker: int) -> Assignment | None:
        if not self._left or (self._heavy and self._too_slow(worker)):
            return None
        if self._alone and self._running:
            return None
        name, task = next(iter(self._left.items()))
        del self._left[name]
        again = f"{_AGAIN}{self._tries[name]}" if name in self._tries else ""
        self._running[name + again] = (name, task)
        return Assignment(id=name + again, task=task)

    def _too_slow(self, worker: int) -> bool:
        left = len(self._left) + len(self._running)
        return max(self._speeds.values()) > left * self._speeds[worker]

    def finished(self, assignment: str, seconds: float) -> list[str]:
        del self._running[assignment]
        return []

    def returned(self, assignment: str, missing: Collection[str] = ()) -> list[str]:
        name, task = self._running.pop(assignment)
        self._tries[name] = self._tries.get(name, 1) + 1
        self._left[name] = task
        return []

    def complete(self) -> bool:
        return not self._left and not self._running
