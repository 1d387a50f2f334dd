"""Which worker holds which chunks of the calibration sequences, and who ought to.

A chunk's hidden states live in one worker's memory, as the input of some block. They are lost with
the worker; then the chunk is an orphan until another makes them again from the texts. While the
old holder lives they can also be handed over. What each ought to hold follows the measured pace; in
a fleet of several kinds, until there is one, a product that each worker times when it starts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.scheduler import Part

NOWHERE = -1  # not even embedded


@dataclass(slots=True)
class Chunk:
    number: int
    owner: int | None = None
    at: int = NOWHERE  # the block whose input its hidden states are
    heir: int | None = None  # who is to have it next
    handed: Part | None = None  # on its way: where its hidden states wait


@dataclass(slots=True)
class Pace:
    """How long one worker takes for one chunk, in seconds, by kind of task."""

    seconds: dict[str, float] = field(default_factory=dict)
    speed: float = 1.0  # beside the others, as measured before it did anything

    def note(self, kind: str, seconds_per_chunk: float) -> None:
        before = self.seconds.get(kind, seconds_per_chunk)
        self.seconds[kind] = (before + seconds_per_chunk) / 2  # recent blocks weigh more

    def per_block(self) -> float | None:
        """Seconds for one chunk through one block; None before both halves were seen."""
        if "Collect" not in self.seconds or "Advance" not in self.seconds:
            return None
        return self.seconds["Collect"] + self.seconds["Advance"]


class Holdings:
    def __init__(self, chunks: int) -> None:
        self.chunks = [Chunk(number) for number in range(chunks)]
        self.paces: dict[int, Pace] = {}
        self._expected: dict[int, float] = {}  # empty when it is to be reckoned again
        self._least = 0.0

    def joined(self, worker: int, speed: float = 1.0) -> None:
        self.paces[worker] = Pace(speed=speed)
        self._expected = {}

    def lost(self, worker: int) -> None:
        self.paces.pop(worker, None)
        self._expected = {}
        for chunk in self.chunks:
            if chunk.heir == worker:
                chunk.heir = None
            if chunk.owner == worker:
                self.orphan([chunk.number])

    def note(self, worker: int, kind: str, seconds_per_chunk: float) -> None:
        self.paces[worker].note(kind, seconds_per_chunk)
        self._expected = {}

    def orphan(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.chunks[number] = Chunk(number)

    def settle(self, numbers: Iterable[int], owner: int, at: int) -> None:
        for number in numbers:
            self.chunks[number] = Chunk(number, owner, at)

    def held(self, worker: int) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.owner == worker]

    def orphans(self) -> list[Chunk]:
        return [c for c in self.chunks if c.owner is None and c.handed is None]

    def handed_to(self, worker: int) -> list[Chunk]:
        """Chunks that wait for this worker, or for anyone: those of its run first of all.

        Chunks in runs are added up to few sums, and what waits for anyone is shared out.
        """
        waiting = [chunk for chunk in self.chunks if chunk.handed is not None]
        coming = [chunk for chunk in waiting if chunk.heir == worker]
        anyones = [chunk for chunk in waiting if chunk.heir is None]
        wanted = self.deficit(worker) if anyones else 0
        if wanted <= 0:
            return coming
        runs = self._runs()
        needs = {other: self.deficit(other) for other in self.paces}
        mine = [c for c in anyones if runs[c.number] == worker or needs[runs[c.number]] <= 0]
        return coming + sorted(mine, key=lambda c: runs[c.number] != worker)[:wanted]

    def _runs(self) -> list[int]:
        """For each chunk the worker whose it is, if every one has one run of them."""
        quotas = self.quotas()
        return [worker for worker in sorted(quotas) for _ in range(quotas[worker])]

    def deficit(self, worker: int) -> int:
        """How many chunks the worker should take on; below zero, how many it could give away."""
        coming = sum(c.heir == worker and c.owner != worker for c in self.chunks)
        return self.quotas()[worker] - len(self.held(worker)) - coming

    def quotas(self) -> dict[int, int]:
        """Whole chunks for each worker in proportion to its speed (largest remainders)."""
        speeds = {worker: 1 / seconds for worker, seconds in self.expected().items()}
        total = sum(speeds.values())
        exact = {worker: len(self.chunks) * speed / total for worker, speed in speeds.items()}
        quotas = {worker: int(share) for worker, share in exact.items()}
        left = len(self.chunks) - sum(quotas.values())
        by_remainder = sorted(exact, key=lambda worker: (quotas[worker] - exact[worker], worker))
        for worker in by_remainder[:left]:
            quotas[worker] += 1
        return quotas

    def expected(self) -> dict[int, float]:
        """Seconds of each worker for a chunk of a block: as seen, or else as its speed has it."""
        if self._expected:
            return self._expected
        seen = {worker: pace.per_block() for worker, pace in self.paces.items()}
        work = [seconds * self.paces[w].speed for w, seconds in seen.items() if seconds]
        usual = sum(work) / len(work) if work else 1.0
        self._expected = {w: seen[w] or usual / pace.speed for w, pace in self.paces.items()}
        self._least = min(self._expected.values(), default=0.0)
        return self._expected

    def slowness(self, worker: int) -> float:
        """How many times as long as the fastest a worker takes."""
        return self.expected()[worker] / self._least

    def rebalance(self, blocks_left: int, seconds_to_move: float) -> None:
        """Name heirs where moving chunks now pays within the blocks that are left.

        A block takes as long as its slowest worker. Chunks go from those that hold too many to
        those that hold too few, if that shortens the rest of the shard by more than the moving.
        """
        quotas = self.quotas()
        held = {worker: self.held(worker) for worker in self.paces}
        if not any(pace.per_block() for pace in self.paces.values()) or len(quotas) < 2:
            return
        paces = self.expected()
        now = max(len(held[worker]) * paces[worker] for worker in quotas)
        then = max(quotas[worker] * paces[worker] for worker in quotas)
        surplus = {w: held[w][quotas[w] :] for w in quotas if len(held[w]) > quotas[w]}
        moved = max((len(chunks) for chunks in surplus.values()), default=0)
        if (now - then) * blocks_left <= moved * seconds_to_move:
            return
        giving = [chunk for worker in sorted(surplus) for chunk in surplus[worker]]
        for worker in sorted(quotas):
            for _ in range(self.deficit(worker)):
                if giving:
                    giving.pop(0).heir = worker
