"""Where a job's time went, block by block, from what its workers told (workers/clock.py).

    parts of all blocks + parts outside blocks = the seconds that all workers were there

A worker is there from the start of quantizing, or since it came, until the end or its loss. What it
told is the parts. What it did not tell was waiting: before its first task, and when there was no
more to do. Of a worker that is lost the time it did not tell is lost too, to the block it was at:
what it did for that is done again by others.

Several workers spend several worker-seconds in a second. Beside them stand the seconds by the clock
in which anyone had a task of a block, and when its first task began and its last one ended. Blocks
overlap: one is written during the next. An accelerator may still be busy when a task has ended.
Blocks of an earlier run are marked, and show what passing them once more took.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.executors import Result
from orchestrator.loop import Observer
from orchestrator.scheduler import Assignment

# in the order in which a block meets them
PARTS = ("read", "forward", "hessian", "factor", "solve", "pack", "write", "waiting", "lost")


@dataclass(slots=True)
class _Row:
    """What was spent on one block, or on none."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of workers
    hidden: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of threads
    under_way: int = 0  # tasks
    since: float = 0.0  # that there are any
    wall: float = 0.0  # with a task under way
    first: float | None = None  # start of a task
    last: float = 0.0  # end of one

    def begin(self, now: float) -> None:
        self.first = now if self.first is None else self.first
        self.since = self.since if self.under_way else now
        self.under_way += 1

    def end(self, now: float) -> None:
        self.last = now
        self.under_way -= 1
        self.wall += 0.0 if self.under_way else now - self.since

    def add(self, seconds: Mapping[str, float], hidden: Mapping[str, float]) -> None:
        for mine, found in ((self.seconds, seconds), (self.hidden, hidden)):
            for part, spent in found.items():
                mine[part] += spent

    def told(self) -> dict[str, Any]:
        return {
            "seconds": {part: _round(self.seconds[part]) for part in PARTS if part in self.seconds},
            "hidden": {part: _round(seconds) for part, seconds in sorted(self.hidden.items())},
        }

    def by_the_clock(self, start: float) -> dict[str, Any]:
        """Of a block that this run had nothing to do with: nothing."""
        if self.first is None:
            return {"wall_seconds": 0.0, "began_at_seconds": None, "ended_at_seconds": None}
        return {
            "wall_seconds": _round(self.wall),
            "began_at_seconds": _round(self.first - start),
            "ended_at_seconds": _round(self.last - start),
        }


@dataclass(slots=True)
class _Worker:
    since: float
    until: float | None = None
    told: float = 0.0  # seconds of all parts
    doing: tuple[str, _Row] | None = None  # an assignment
    lost_at: _Row | None = None


class Profiler(Observer):
    """Listens to a job while it quantizes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._rows: dict[int | None, _Row] = {}
        self._workers: dict[int, _Worker] = {}
        self._start = 0.0
        self._end: float | None = 0.0  # None: it quantizes

    def begin(self, workers: Collection[int]) -> None:
        self._start, self._end = self._clock(), None
        self._workers = {worker: _Worker(self._start) for worker in workers}

    def end(self) -> None:
        """Quantizing is over; what workers still tell afterwards is of the time before."""
        for worker in self._workers.values():
            self._stop(worker)
        self._end = self._clock()

    def submitted(self, assignment: Assignment, worker: int) -> None:
        if self._end is not None:
            return
        who = self._there(worker)
        self._stop(who)  # a task that came back for want of its inputs
        row = self._row(getattr(assignment.task, "block", None))
        who.doing = assignment.id, row
        row.begin(self._clock())

    def finished(self, assignment: Assignment, result: Result) -> None:
        worker = self._workers.get(result.worker)
        if worker is None:  # it came when quantizing was over
            return
        if worker.doing is not None and worker.doing[0] == assignment.id:
            self._stop(worker)
        for spent in result.summary.get("spent", ()):
            self._row(spent["block"]).add(spent["seconds"], spent["hidden"])
            worker.told += sum(spent["seconds"].values())

    def note(self, event: str, **facts: Any) -> None:
        if self._end is not None:
            return
        if event == "worker joined":
            self._there(facts["worker"])
        elif event == "worker lost":
            worker = self._there(facts["worker"])
            worker.until = self._clock()
            worker.lost_at = self._row(None) if worker.doing is None else worker.doing[1]
            self._stop(worker)

    def profile(self, blocks: int, earlier: Collection[int]) -> dict[str, Any]:
        """As it stands in the report; `earlier` are the blocks that an earlier run published."""
        assert self._end is not None
        rows = [self._row(block) for block in range(blocks)]
        outside, total = self._row(None), _Row()
        for worker in self._workers.values():
            until = self._end if worker.until is None else worker.until
            untold = max(until - worker.since - worker.told, 0.0)
            if worker.lost_at is None:
                outside.seconds["waiting"] += untold
            else:
                worker.lost_at.seconds["lost"] += untold
        for row in [*rows, outside]:
            total.add(row.seconds, row.hidden)
        return {
            "workers": len(self._workers),
            "wall_seconds": _round(self._end - self._start),
            "total": total.told(),
            "blocks": [
                {
                    "block": block,
                    "earlier": block in earlier,
                    **row.by_the_clock(self._start),
                    **row.told(),
                }
                for block, row in enumerate(rows)
            ],
            "outside": outside.told(),
        }

    def _stop(self, worker: _Worker) -> None:
        if worker.doing is not None:
            worker.doing[1].end(self._clock())
        worker.doing = None

    def _there(self, worker: int) -> _Worker:
        return self._workers.setdefault(worker, _Worker(self._clock()))

    def _row(self, block: int | None) -> _Row:
        return self._rows.setdefault(block, _Row())


def _round(seconds: float) -> float:
    return round(seconds, 6)
