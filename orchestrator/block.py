"""One block on its way from collected moments to its published file.

    collect (every chunk once) -> reduce (wide groups, by row bands) -> solve (by row tiles)
        -> save (statistics, where they are to be kept) -> publish -> settle

Once it is solved, chunks pass it and the next block begins, while one worker writes it. Results
stay where they were made until the block stands in the store, so that whatever is lost on the way
is made again from what is not.

The forward that chunks pass by does not overlap the widest factorization: it would hold each
chunk's widest activations while it waits. Solves are 9 per cent of a block on a CPU; on one H200
the widest factorization is 36 ms of a block's 2.0 s, at Llama-3.1-8B's widths and 512 x 2,048
tokens.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from orchestrator.pieces import piece_cost, pieces_of
from orchestrator.scheduler import Assignment, Part
from workers.plan import Plan
from workers.tasks import Collect, Publish, Reduce, Round, Save, Settle, Solve, Task

BAND_BYTES = 64 * 2**20  # Hessians from here on are reduced in bands, one for each worker
MOST_BAND_BYTES = 256 * 2**20


@dataclass(slots=True)
class Step:
    """Something that is done once: waiting, then running, then done by a worker."""

    task: Task
    cost: float = 0.0
    running: str | None = None  # the assignment
    done: str | None = None
    by: int | None = None

    @property
    def waiting(self) -> bool:
        return self.running is None and self.done is None


@dataclass(slots=True, eq=False)
class BlockWork:
    plan: Plan
    index: int
    hands: int  # workers to spread over: decides pieces and bands, and no bit of the result
    epoch: int  # of the driver
    serial: Iterator[int] = field(default_factory=itertools.count)  # for assignments' names
    collects: list[Step] = field(default_factory=list)
    reduces: dict[tuple[int, int], Step] = field(default_factory=dict)  # by group and band
    solves: list[Step] = field(default_factory=list)
    saves: list[Step] = field(default_factory=list)
    publish: Step = field(init=False)
    settle: Step = field(init=False)
    _bands: tuple[int, ...] = ()
    _ranged: list[int] = field(default_factory=list)  # the groups whose ranges are wanted

    def __post_init__(self) -> None:
        groups = self.plan.blocks[self.index].groups
        self.settle = Step(Settle(self.index))
        if not self.calibrated:
            self.publish = Step(Round(self.index, self.epoch))
            return
        self.publish = Step(Publish(self.index, self.epoch))
        self._bands = tuple(
            band_count(g.in_features, self.hands) if self.plan.summed(g) else 0 for g in groups
        )
        self._ranged = [number for number, group in enumerate(groups) if self.plan.ranged(group)]
        cut = pieces_of(self.plan, groups, self.hands)
        for number, (group, pieces) in enumerate(zip(groups, cut, strict=True)):
            if self._bands[number] > 1:
                for band in range(self._bands[number]):
                    self.reduces[number, band] = Step(Reduce(self.index, number, band))
            for tiles in pieces:
                cost = piece_cost(self.plan, group, len(tiles))
                self.solves.append(Step(Solve(self.index, number, tiles), cost))
            if self.plan.keeps_statistics:
                self.saves.append(Step(Save(self.index, number)))
        self.solves.sort(key=lambda step: -step.cost)

    @property
    def calibrated(self) -> bool:
        return self.plan.calibrates(self.index)

    @property
    def published(self) -> bool:
        last = self.settle if self.calibrated else self.publish
        return last.done is not None

    @property
    def solved(self) -> bool:
        return self.calibrated and all(step.done is not None for step in self._readers())

    @property
    def passed(self) -> bool:
        """Whether nothing more is to be made of it, even if its codes are gone: it is written."""
        return self.solved or (self.calibrated and self.publish.done is not None)

    def uncollected(self, chunks: Iterable[int]) -> tuple[int, ...]:
        """Those of the chunks whose moments are still asked for."""
        if not any(self._reads_collected(step) for step in self._readers() if step.done is None):
            return ()
        taken = {chunk for step in self.collects for chunk in _chunks(step)}
        return tuple(chunk for chunk in chunks if chunk not in taken)

    def collect(self, chunks: tuple[int, ...]) -> Assignment:
        step = Step(Collect(self.index, chunks, self._bands))
        self.collects.append(step)
        return self._start(step, parts=sum(self._bands) + len(self._ranged))

    @property
    def solves_left(self) -> int:
        return sum(step.done is None for step in self.solves)

    def offer(self, *, solves: bool = True) -> Assignment | None:
        """What anyone could do now, the dearest first: the others wait for it.

        Who would take longer for one solve than another for all of them is offered none.
        """
        if not self.calibrated:
            return self._start(self.publish) if self.publish.waiting else None
        for step in self._readers():
            if not step.waiting:
                continue
            if isinstance(step.task, Solve) and not solves:
                if (assignment := self._reduce(step)) is not None:
                    return assignment
                continue
            if (inputs := self._statistics(step)) is not None:
                return self._start(step, inputs, parts=isinstance(step.task, Solve))
            if (assignment := self._reduce(step)) is not None:
                return assignment
        return None

    def write(self, worker: int, *, due: bool) -> Assignment | None:
        """Begin to write what is solved; when that is due, hear from who does how it ended."""
        if self.solved and self.publish.waiting:
            return self._start(self.publish, self.codes())
        if due and self.publish.by == worker and self.settle.waiting:
            return self._start(self.settle)
        return None

    def codes(self) -> tuple[Part, ...]:
        """What all solves gave."""
        return tuple((_done(step), 0) for step in self.solves)

    def gave(self, assignment: str) -> bool:
        return any(step.running == assignment for step in self._all())

    def finished(self, assignment: str, worker: int) -> Step:
        step = self._step(assignment)
        step.running, step.done, step.by = None, assignment, worker
        return step

    def returned(self, assignment: str, missing: Collection[str]) -> list[str]:
        step = self._step(assignment)
        step.running = None
        if isinstance(step.task, Collect):
            self.collects.remove(step)
        return self.missed(missing)

    def missed(self, results: Collection[str]) -> list[str]:
        """Some results are gone."""
        return self._undo(step for step in self._steps() if step.done in results)

    def lost(self, worker: int, *, parts_kept: bool) -> list[str]:
        """A worker is gone: what it was writing, and unless they are kept its results."""
        if self.publish.by == worker and not self.published:
            self.publish.done = self.publish.by = None
        if parts_kept:
            return []
        return self._undo(s for s in self._steps() if s.done is not None and s.by == worker)

    def results(self) -> list[str]:
        """The assignments whose parts are still kept."""
        return [step.done for step in self._steps() if step.done is not None]

    def _undo(self, steps: Iterable[Step]) -> list[str]:
        released = []
        for step in list(steps):
            released.append(_done(step))
            step.done = step.by = None
            if isinstance(step.task, Collect):
                self.collects.remove(step)
        return released

    def _readers(self) -> list[Step]:
        """What reads a group's statistics."""
        return [*self.solves, *self.saves]

    def _statistics(self, reader: Step) -> list[Part] | None:
        """The parts that tell of a group's inputs; None while they are not all there."""
        if self._reads_collected(reader) and not self._collected():
            return None
        if self._bands_of(reader) and not self._reduced(reader):
            return None
        parts = [(_done(step), 0) for step in self._bands_of(reader)]
        number = _group(reader)
        if self._bands[number] == 1:
            first = sum(self._bands[:number])
            parts += [(_done(step), first) for step in self.collects]
        if number in self._ranged:
            place = sum(self._bands) + self._ranged.index(number)
            parts += [(_done(step), place) for step in self.collects]
        return parts

    def _reads_collected(self, reader: Step) -> bool:
        """Whether anything of what was collected is still to be read for it."""
        return _group(reader) in self._ranged or not self._reduced(reader)

    def _reduce(self, reader: Step) -> Assignment | None:
        """One row band of a group's Hessian, if there is one to do."""
        step = next((step for step in self._bands_of(reader) if step.waiting), None)
        if step is None or not self._collected():
            return None
        assert isinstance(step.task, Reduce)
        part = sum(self._bands[: step.task.group]) + step.task.band
        return self._start(step, [(_done(c), part) for c in self.collects], parts=1)

    def _bands_of(self, reader: Step) -> list[Step]:
        group = _group(reader)
        return [step for (number, _), step in self.reduces.items() if number == group]

    def _reduced(self, reader: Step) -> bool:
        bands = self._bands_of(reader)
        return bool(bands) and all(step.done is not None for step in bands)

    def _collected(self) -> bool:
        """Whether every chunk's moments are there."""
        count = sum(len(_chunks(step)) for step in self.collects if step.done is not None)
        return count == self.plan.contract.chunks

    def _start(self, step: Step, inputs: Iterable[Part] = (), parts: int = 0) -> Assignment:
        kind = type(step.task).__name__.lower()
        step.running = f"{kind}/{self.index}/{next(self.serial)}"
        return Assignment(id=step.running, task=step.task, inputs=tuple(inputs), parts=parts)

    def _step(self, assignment: str) -> Step:
        return next(step for step in self._all() if step.running == assignment)

    def _all(self) -> Iterable[Step]:
        return [*self._steps(), *self.saves, self.publish, self.settle]

    def _steps(self) -> Iterable[Step]:
        """Those whose results have parts; what is in the store has no way back."""
        return [*self.collects, *self.reduces.values(), *self.solves]


def band_count(width: int, hands: int) -> int:
    """How many row bands a Hessian's lower triangle is cut into: one where it is small."""
    num_bytes = 2 * width**2
    if hands == 1 or num_bytes < BAND_BYTES:
        return 1
    return max(hands, -(-num_bytes // MOST_BAND_BYTES))


def _chunks(step: Step) -> tuple[int, ...]:
    assert isinstance(step.task, Collect)
    return step.task.chunks


def _group(reader: Step) -> int:
    assert isinstance(reader.task, Solve | Save)
    return reader.task.group


def _done(step: Step) -> str:
    assert step.done is not None
    return step.done
