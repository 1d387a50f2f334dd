"""Chunks on their way from one worker to another: given away as a result, and taken out of it.

Who gives names nobody: a chunk's heir takes it, or where it has none whoever has too few. Where the
heir is predicted to make it anew sooner than it would receive it, it is dropped instead. A result
stays until all its chunks were taken, or are lost.
"""

from collections.abc import Collection, Iterable

from orchestrator.holdings import Chunk, Holdings
from orchestrator.scheduler import Part
from workers.tasks import Drop, Hand, Take

_BYTES_PER_S = 200e6  # until a transfer was seen


class HandOvers:
    """Of one shard. Lists that are returned are of results that need not be kept."""

    def __init__(self, holdings: Holdings, chunk_bytes: int) -> None:
        self._holdings = holdings
        self._chunk_bytes = chunk_bytes
        self._bytes_per_s = _BYTES_PER_S
        self._results = _Results()

    @property
    def seconds_each(self) -> float:
        """What it takes to move one chunk, as seen so far."""
        return self._chunk_bytes / self._bytes_per_s

    def leaving(self, worker: int) -> Hand | Drop | None:
        """Those of a worker that another is to have, who may as well make them anew."""
        leaving = [c for c in self._holdings.held(worker) if c.heir not in (None, worker)]
        if not leaving:
            return None
        numbers = tuple(chunk.number for chunk in leaving)
        return Drop(numbers) if self._replay_is_cheaper(leaving[0]) else Hand(numbers)

    def _replay_is_cheaper(self, chunk: Chunk) -> bool:
        """Whether the heir makes a chunk's hidden states again sooner than it receives them."""
        assert chunk.heir is not None
        known = self._holdings.paces[chunk.heir].seconds
        if "Advance" not in known:
            return False
        replay = known.get("Embed", 0.0) + chunk.at * known["Advance"]
        return replay < self.seconds_each

    def given(self, result: str, giver: int, chunks: Collection[int]) -> list[str]:
        for part, number in enumerate(chunks):
            chunk = self._holdings.chunks[number]
            chunk.owner, chunk.handed = None, (result, part)
        return self._results.add(result, giver, chunks)

    def shown(self, result: str, giver: int, parts: dict[int, int], at: int) -> list[str]:
        """By the shard before: by chunk, the part of the result that is wanted of it."""
        for number, part in parts.items():
            chunk = self._holdings.chunks[number]
            chunk.handed, chunk.at = (result, part), at
        return self._results.add(result, giver, parts)

    def coming(self, worker: int) -> tuple[Take, tuple[Part, ...]] | None:
        """What a worker is to take, now that it is its own, and where that is."""
        coming = self._holdings.handed_to(worker)
        if not coming:
            return None
        for chunk in coming:
            chunk.owner, chunk.heir = worker, worker
        inputs = tuple(chunk.handed for chunk in coming if chunk.handed is not None)
        return Take(tuple(chunk.number for chunk in coming)), inputs

    def taken(self, worker: int, chunks: Collection[int], seconds: float) -> list[str]:
        measured = self._chunk_bytes / max(seconds / max(len(chunks), 1), 1e-6)
        self._bytes_per_s = (self._bytes_per_s + measured) / 2
        released = self._results.forget(chunks)
        for number in chunks:
            self._holdings.settle([number], worker, self._holdings.chunks[number].at)
        return released

    def not_taken(self, chunks: Collection[int], missing: Collection[str]) -> list[str]:
        """Some of the results were missing: the other chunks wait for the next taker."""
        gone = self._results.gone(missing)
        lost = [number for number in chunks if self._result_of(number) in gone]
        for number in chunks:
            self._holdings.chunks[number].owner = None
        self._holdings.orphan(lost)
        return self._results.forget(lost)

    def lost(self, giver: int) -> list[str]:
        """Chunks that only a lost worker's results held; those being taken will tell themselves."""
        numbers = self._results.lost(giver)
        lost = [n for n in numbers if self._holdings.chunks[n].owner is None]
        self._holdings.orphan(lost)
        return self._results.forget(lost)

    def waiting(self) -> int:
        return sum(chunk.handed is not None for chunk in self._holdings.chunks)

    def end(self) -> list[str]:
        return self._results.end()

    def _result_of(self, number: int) -> str | None:
        handed = self._holdings.chunks[number].handed
        return handed[0] if handed else None


class _Results:
    """Each until its chunks were taken, or are lost."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[int, set[int]]] = {}  # who gave them, chunks not taken yet
        self._gone: set[str] = set()

    def add(self, result: str, giver: int, chunks: Iterable[int]) -> list[str]:
        self._waiting[result] = (giver, set(chunks))
        return self.forget(())

    def forget(self, chunks: Collection[int]) -> list[str]:
        """These were taken, or are lost."""
        for _, left in self._waiting.values():
            left.difference_update(chunks)
        empty = [result for result, (_, left) in self._waiting.items() if not left]
        for result in empty:
            del self._waiting[result]
            self._gone.discard(result)
        return empty

    def lost(self, giver: int) -> list[int]:
        """The results of a worker are gone: which chunks they held that were not taken yet."""
        own = {result: left for result, (by, left) in self._waiting.items() if by == giver}
        self._gone.update(own)
        return [chunk for left in own.values() for chunk in left]

    def gone(self, missing: Iterable[str]) -> set[str]:
        """Those known to be gone, and some more that were missed."""
        return self._gone.union(missing)

    def end(self) -> list[str]:
        """Nobody will take any more."""
        unread = list(self._waiting)
        self._waiting.clear()
        return unread
