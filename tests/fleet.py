"""A fleet that does no work but keeps every rule of it: workers hold chunks, results get lost.

It carries a scheduler's instructions out and holds each to what could be done at that moment: a
worker can collect only what it holds, a result can be read only while somebody has it.
"""

from collections import Counter
from dataclasses import dataclass, field

from orchestrator.scheduler import (
    Assignment,
    Event,
    Finished,
    InputsMissing,
    Joined,
    Release,
    Run,
    Scheduler,
    Stop,
    Work,
    WorkerLost,
)
from workers.plan import Plan
from workers.tasks import (
    Advance,
    Boundary,
    Collect,
    CopyOutside,
    Drop,
    Embed,
    Hand,
    Keep,
    Load,
    Publish,
    Reduce,
    Round,
    Settle,
    Solve,
    Survey,
    Sweep,
    Take,
)


@dataclass
class FakeWorker:
    held: dict[int, int] = field(default_factory=dict)  # chunks, each at the input of a block
    writing: int | None = None  # a block
    doing: Assignment | None = None


@dataclass
class Kept:
    """A result that can be read: who made it, and for sums and codes, of what they are."""

    worker: int
    parts: int
    covers: Counter[tuple[int, ...]]


@dataclass
class Fleet:
    plan: Plan
    works: list[Work]
    done: set[int] = field(default_factory=set)  # blocks that were published before
    workers: dict[int, FakeWorker] = field(default_factory=dict)
    results: dict[str, Kept] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)
    kept: set[tuple[int, int]] = field(default_factory=set)  # (block, chunk) in the store
    losses: Counter[tuple[str, int]] = field(default_factory=Counter)
    started: list[str] = field(default_factory=list)
    stopped: Stop | None = None
    hired: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.works)

    def join(self, count: int = 1, speed: float = 1.0) -> None:
        numbers = tuple(range(self.hired, self.hired + count))
        self.hired += count
        self.workers |= {number: FakeWorker() for number in numbers}
        self.send(Joined(numbers, (speed,) * count))

    def busy(self) -> list[int]:
        return [number for number, worker in self.workers.items() if worker.doing]

    def lose(self, number: int, *, parts_kept: bool) -> None:
        worker = self.workers.pop(number)
        if worker.doing:
            task = worker.doing.task
            self.losses[type(task).__name__, getattr(task, "block", -1)] += 1
        if not parts_kept:
            self.results = {n: k for n, k in self.results.items() if k.worker != number}
        self.send(WorkerLost(number, parts_kept))

    def finish(self, number: int, seconds: float = 1.0) -> None:
        worker = self.workers[number]
        assignment = worker.doing
        assert assignment is not None
        worker.doing = None
        gone = tuple(sorted({s for s, _ in assignment.inputs if s not in self.results}))
        if gone:
            self.send(InputsMissing(assignment.id, gone))
            return
        covers = self._do(number, worker, assignment)
        self.results[assignment.id] = Kept(number, assignment.parts, covers)
        self.send(Finished(assignment.id, seconds))
        self.results = {n: k for n, k in self.results.items() if k.parts}

    def send(self, event: Event) -> None:
        for instruction in self.scheduler.handle(event):
            assert self.stopped is None, "an instruction after the last one"
            match instruction:
                case Run(assignment, number):
                    self._start(assignment, number)
                case Release(name):
                    self.results.pop(name, None)
                case Stop():
                    self.stopped = instruction

    def _start(self, assignment: Assignment, number: int) -> None:
        worker = self.workers[number]
        assert worker.doing is None, "two tasks at once"
        assert assignment.id not in self.started, "one assignment given twice"
        for source, part in assignment.inputs:
            assert source in self.results, f"{assignment.id} reads {source}, which nobody has"
            assert part < self.results[source].parts
        self.started.append(assignment.id)
        worker.doing = assignment

    def _do(
        self, number: int, worker: FakeWorker, assignment: Assignment
    ) -> Counter[tuple[int, ...]]:
        """What the task does to its worker; what its result covers."""
        inputs = [(self.results[source], part) for source, part in assignment.inputs]
        match assignment.task:
            case Embed(chunks):
                self._check_new(worker, chunks)
                worker.held |= dict.fromkeys(chunks, 0)
            case Hand(chunks):
                return Counter((chunk, worker.held.pop(chunk)) for chunk in chunks)
            case Take(chunks):
                self._check_new(worker, chunks)
                for chunk, (kept, part) in zip(chunks, inputs, strict=True):
                    given, block = list(kept.covers)[part]
                    assert given == chunk
                    worker.held[chunk] = block
            case Drop(chunks):
                for chunk in chunks:
                    worker.held.pop(chunk, None)
            case Keep(block, chunks):
                assert all(worker.held[chunk] == block for chunk in chunks)
                self.kept |= {(block, chunk) for chunk in chunks}
            case Load(block, chunks):
                self._check_new(worker, chunks)
                assert all((block, chunk) in self.kept for chunk in chunks)
                worker.held |= dict.fromkeys(chunks, block)
            case Sweep(first, last):
                self.kept = {(b, chunk) for b, chunk in self.kept if not first <= b < last}
            case Boundary(first, last, chunks):
                assert (first, last) in self.plan.shard_ranges()
                assert all(worker.held[chunk] == first for chunk in chunks)
                return Counter((chunk, last) for chunk in chunks)
            case Advance(block, chunks, published):
                if assignment.inputs:
                    solved = sum((kept.covers for kept, _ in inputs), Counter[tuple[int, ...]]())
                    assert solved == every_tile(self.plan, block)
                else:
                    assert not published or block in self._finished_blocks()
                assert all(worker.held[chunk] == block for chunk in chunks)
                worker.held |= dict.fromkeys(chunks, block + 1)
            case Collect(block, chunks, bands):
                assert block in self._left(block)[:2], "the one before may be on its way"
                assert all(worker.held[chunk] == block for chunk in chunks)
                ranged = sum(map(self.plan.ranged, self.plan.blocks[block].groups))
                assert assignment.parts == sum(bands) + ranged
                return Counter((block, chunk) for chunk in chunks)
            case Reduce(block):
                assert len({part for _, part in inputs}) == 1
                return self._all_chunks(block, [kept.covers for kept, _ in inputs])
            case Solve(block, group, tiles):
                self._check_statistics(block, group, assignment, inputs)
                return Counter((block, group, *tile) for tile in tiles)
            case Publish(block):
                solved = sum((kept.covers for kept, _ in inputs), Counter[tuple[int, ...]]())
                assert solved == every_tile(self.plan, block)
                assert block == self._next_block(block), "out of order"
                worker.writing = block
            case Settle(block):
                assert worker.writing == block
                worker.writing = None
                self._publish(block)
            case Round(block):
                self._publish(block)
            case CopyOutside() | Survey():
                pass
            case task:
                raise AssertionError(f"a fleet that quantizes was given {task}")
        return Counter()

    def _check_statistics(
        self, block: int, number: int, assignment: Assignment, inputs: list[tuple[Kept, int]]
    ) -> None:
        """A solve reads its group's sums, reduced or everyone's own, and its ranges if wanted."""
        group = self.plan.blocks[block].groups[number]
        collected: dict[int, list[Counter[tuple[int, ...]]]] = {}  # by part
        reduced = []
        for (source, _), (kept, part) in zip(assignment.inputs, inputs, strict=True):
            if source.startswith("reduce/"):
                reduced.append(kept.covers)
            else:
                collected.setdefault(part, []).append(kept.covers)
        assert all(covers == self._every(block) for covers in reduced)
        for covers in collected.values():
            self._all_chunks(block, covers)
        sums = self.plan.summed(group) and not reduced
        assert len(collected) == sums + self.plan.ranged(group)

    def _publish(self, block: int) -> None:
        if self.plan.calibration is not None:
            assert block == self._next_block(block), "out of order"
        assert block not in self._finished_blocks(), "published twice"
        self.published.append(block)

    def _all_chunks(
        self, block: int, covers: list[Counter[tuple[int, ...]]]
    ) -> Counter[tuple[int, ...]]:
        total = sum(covers, Counter[tuple[int, ...]]())
        assert total == self._every(block), "a chunk is missing from a sum, or is in it twice"
        return total

    def _every(self, block: int) -> Counter[tuple[int, ...]]:
        return Counter((block, chunk) for chunk in range(self.plan.contract.chunks))

    def _check_new(self, worker: FakeWorker, chunks: tuple[int, ...]) -> None:
        """In one shard a chunk is held once; another shard may hold the same chunk elsewhere."""
        assert not set(chunks) & set(worker.held)
        if self.plan.shards == 1:
            held = {chunk for other in self.workers.values() for chunk in other.held}
            assert not set(chunks) & held

    def _finished_blocks(self) -> set[int]:
        return self.done | set(self.published)

    def _next_block(self, block: int) -> int:
        return self._left(block)[0]

    def _left(self, block: int) -> list[int]:
        """The unfinished blocks of a block's shard, in order."""
        shard = next(range(a, b) for a, b in self.plan.shard_ranges() if a <= block < b)
        return sorted(set(shard) - self._finished_blocks())


def every_tile(plan: Plan, block: int) -> Counter[tuple[int, ...]]:
    """(block, group, stack, tile) of all that is to be solved in a block."""
    return Counter(
        (block, group, stack, tile)
        for group, plan_of_group in enumerate(plan.blocks[block].groups)
        for stack, layers in enumerate(plan_of_group.stacks())
        for tile in range(len(plan.row_tiles(layers)))
    )
