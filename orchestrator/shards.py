"""All shards of a job at once, each with the workers that are dealt to it.

A worker belongs to one shard until that is finished; then it helps where most is left per worker.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from orchestrator.calibration import Shard
from orchestrator.scheduler import Assignment
from workers.tasks import Drop


class Shards:
    def __init__(self, shards: Sequence[Shard], chunks: int) -> None:
        self._shards = shards
        self._every_chunk = tuple(range(chunks))
        self._shard_of: dict[int, Shard] = {}
        self._given_by: dict[str, Shard | None] = {}  # None: a worker on its way to another shard
        # a worker that was given nothing, and its shard's version then: so that hundreds of idle
        # workers are not looked at again after each event elsewhere
        self._waiting: dict[int, tuple[Shard, int]] = {}
        self._moves = 0
        self._speeds: dict[int, float] = {}

    def joined(self, worker: int, speed: float) -> None:
        self._speeds[worker] = speed
        self._deal(worker)

    def lost(self, worker: int, *, parts_kept: bool) -> list[str]:
        self._shard_of.pop(worker, None)
        self._waiting.pop(worker, None)
        released = []
        for shard in self._shards:
            released += shard.lost(worker, parts_kept=parts_kept)
        return released

    def offer(self, worker: int) -> Assignment | None:
        shard = self._shard_of.get(worker)
        if shard is None or self._waiting.get(worker) == (shard, shard.version):
            return None
        if shard.complete():
            return self._move(worker, shard)
        assignment = shard.offer(worker)
        if assignment is None:
            self._waiting[worker] = (shard, shard.version)
            return None
        self._given_by[assignment.id] = shard
        if len(self._shards) == 1:
            return assignment
        return replace(assignment, shard=self._shards.index(shard))

    def finished(self, assignment: str, seconds: float) -> list[str]:
        shard = self._given_by.pop(assignment)
        return [] if shard is None else shard.finished(assignment, seconds)

    def returned(self, assignment: str, missing: Collection[str] = ()) -> list[str]:
        shard = self._given_by.pop(assignment)
        return [] if shard is None else shard.returned(assignment, missing)

    def complete(self) -> bool:
        return all(shard.complete() for shard in self._shards)

    def _deal(self, worker: int) -> None:
        """The shard with the most blocks left for each of its workers, this one counted."""
        unfinished = [shard for shard in self._shards if not shard.complete()]
        if unfinished:
            shard = max(unfinished, key=lambda shard: shard.blocks_left / (shard.members + 1))
            shard.joined(worker, self._speeds[worker])
            self._shard_of[worker] = shard

    def _move(self, worker: int, finished: Shard) -> Assignment | None:
        """What it held for the finished shard is forgotten first."""
        finished.lost(worker, parts_kept=True)
        del self._shard_of[worker]
        self._deal(worker)
        if worker not in self._shard_of:
            return None
        self._moves += 1
        assignment = Assignment(id=f"drop/move.{self._moves}", task=Drop(self._every_chunk))
        self._given_by[assignment.id] = None
        return assignment
