"""Who does what next: a pure state machine, with no clock and no I/O.

    handle(event) -> [instruction, ...]

A job is a few `Work`s (bag.py, calibration.py): each knows what is left of its part, gives some of
it to an idle worker that is offered, and hears how that ended. The scheduler keeps the workers:
who is there, who is idle, who is doing what. Workers come and go at any time. What a lost worker
was doing is dealt again; what has ended several workers ends the job, because it would end the
next one too. A result that comes from a worker already given up is only put away.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.tasks import Task

Part = tuple[str, int]  # an assignment's id and the number of one part of its result

MOST_LOSSES = 4  # workers that one step of a block may end before it is blamed
MOST_MISSING = 32  # results that it may miss: several are lost with one worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One task, given to one worker once. A second try is another assignment."""

    id: str
    task: Task
    inputs: tuple[Part, ...] = ()
    parts: int = 0  # how many parts its result has
    shard: int | None = None  # that it belongs to, where there are several


class Work(Protocol):
    """A part of a job. Lists that are returned name assignments whose parts nobody needs now."""

    def joined(self, worker: int, speed: float) -> None: ...
    def lost(self, worker: int, *, parts_kept: bool) -> list[str]: ...
    def offer(self, worker: int) -> Assignment | None: ...
    def finished(self, assignment: str, seconds: float) -> list[str]: ...
    def returned(self, assignment: str, missing: Collection[str] = ()) -> list[str]: ...
    def complete(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Joined:
    """Workers are there, all of them idle. They are dealt to together."""

    workers: tuple[int, ...]
    speeds: tuple[float, ...] = ()  # beside each other, as first measured; none: all alike


@dataclass(frozen=True, slots=True)
class Finished:
    assignment: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that another try would meet again."""

    assignment: str


@dataclass(frozen=True, slots=True)
class InputsMissing:
    """A worker could not get results that were still there when it was given the task."""

    assignment: str
    producers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker: int
    parts_kept: bool = False  # whether results it gave before can still be read


Event = Joined | Finished | Failed | InputsMissing | WorkerLost


@dataclass(frozen=True, slots=True)
class Run:
    assignment: Assignment
    worker: int


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody will read the parts of this assignment's result any more."""

    assignment: str


@dataclass(frozen=True, slots=True)
class Stop:
    """No more instructions will come: all is finished, or something failed."""

    complete: bool


Instruction = Run | Release | Stop


def step_of(task: Task) -> tuple[str, int]:
    return type(task).__name__, getattr(task, "block", -1)


class Scheduler:
    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works
        self._idle: set[int] = set()
        self._running: dict[str, tuple[int, Assignment, Work]] = {}
        self._losses: Counter[tuple[str, int]] = Counter()
        self._missing: dict[tuple[str, int], set[str]] = {}
        self._stopped = False

    def handle(self, event: Event) -> list[Instruction]:
        if self._stopped:
            return []
        if self._is_fatal(event):
            return self._stop(complete=False)
        instructions: list[Instruction] = [Release(name) for name in self._hear(event)]
        if all(work.complete() for work in self._works):
            return [*instructions, *self._stop(complete=True)]
        return [*instructions, *self._deal()]

    def _hear(self, event: Event) -> list[str]:
        """Tell the works what happened; the assignments whose parts nobody needs any more."""
        match event:
            case Joined(workers, speeds):
                for worker, speed in zip(workers, speeds or [1.0] * len(workers), strict=True):
                    self._idle.add(worker)
                    for work in self._works:
                        work.joined(worker, speed)
            case Finished(assignment, seconds):
                if assignment not in self._running:
                    return [assignment]
                return self._take_back(assignment).finished(assignment, seconds)
            case InputsMissing(assignment, producers) if assignment in self._running:
                return self._take_back(assignment).returned(assignment, producers)
            case WorkerLost(worker, parts_kept):
                released = []
                for assignment in self._given_to(worker):
                    released += self._take_back(assignment).returned(assignment)
                self._idle.discard(worker)
                for work in self._works:
                    released += work.lost(worker, parts_kept=parts_kept)
                return released
        return []

    def _is_fatal(self, event: Event) -> bool:
        """Whether another try is of no use; losses are counted against what was being done."""
        match event:
            case Failed(assignment):
                return assignment in self._running
            case InputsMissing(assignment, producers) if assignment in self._running:
                missing = self._missing.setdefault(self._step(assignment), set())
                missing.update(producers)
                return len(missing) >= MOST_MISSING
            case WorkerLost(worker):
                steps = [self._step(assignment) for assignment in self._given_to(worker)]
                self._losses.update(steps)
                return any(self._losses[step] >= MOST_LOSSES for step in steps)
        return False

    def _deal(self) -> list[Instruction]:
        """Offer each idle worker to the works, first come first served in their order."""
        instructions: list[Instruction] = []
        for worker in sorted(self._idle):
            for work in self._works:
                assignment = work.offer(worker)
                if assignment is not None:
                    assert assignment.id not in self._running, f"{assignment.id} is given twice"
                    self._running[assignment.id] = (worker, assignment, work)
                    self._idle.discard(worker)
                    instructions.append(Run(assignment, worker))
                    break
        assert self._running or not self._idle, "there is work left that no worker is given"
        return instructions

    def _take_back(self, assignment: str) -> Work:
        worker, _, work = self._running.pop(assignment)
        self._idle.add(worker)
        return work

    def _given_to(self, worker: int) -> list[str]:
        return [name for name, (doing, _, _) in self._running.items() if doing == worker]

    def _step(self, assignment: str) -> tuple[str, int]:
        """What trouble is counted against: a step of a block, whoever does it."""
        return step_of(self._running[assignment][1].task)

    def _stop(self, *, complete: bool) -> list[Instruction]:
        self._stopped = True
        return [Stop(complete)]
