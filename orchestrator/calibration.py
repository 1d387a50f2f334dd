"""Calibrated quantization of consecutive blocks by workers that come and go.

Each block sees inputs that passed through the quantized blocks before it, so blocks go in order.
What a worker should do next is read off the state whenever it is idle:

    hand over chunks that another is to have, take over chunks that wait for it,
    catch up: take its chunks through blocks that are published already,
    show the next shard what its chunks are after this one, at full precision,
    collect the moments of its chunks, adopt chunks that nobody holds,
    reduce, solve: whatever is next for the block.

A block that is solved is written by one worker while all go on: chunks pass it by its codes, and
the next block is collected and solved. That one is written once the first stands in the store.

So a failure needs no plan of its own, and there is no table of tasks and transitions, which would
need a row for every way to fail. A lost worker's chunks become orphans, its unread results count as
not there unless its node lives, and the same rules make both again; a job that is taken up from the
ledger starts with every chunk an orphan and some blocks published. Where the codes are lost of a
block that was not yet written, chunks that passed it are dropped, and it is done again.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.block import BlockWork
from orchestrator.handed import HandOvers
from orchestrator.holdings import NOWHERE, Holdings
from orchestrator.keeping import Keeping
from orchestrator.scheduler import Assignment, Part
from orchestrator.underway import Underway
from workers.plan import Plan
from workers.tasks import (
    Advance,
    Boundary,
    Collect,
    Drop,
    Embed,
    Hand,
    Keep,
    Load,
    Sweep,
    Take,
    Task,
)

MOST_WAITING = 2  # chunks shown to a shard and not yet taken, for each of its workers


@dataclass(slots=True)
class _Trip:
    """An assignment under way that moves chunks rather than the block."""

    worker: int
    task: Task
    chunks: tuple[int, ...]


class Shard:
    """`blocks` of the plan, of which some are `done`.

    The first shard's inputs are the embedded texts. Another's are the hidden states of the model
    as the source has it: from the shard `before` it, or where that has moved on, by a replay.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: range,
        done: Collection[int],
        *,
        before: "Shard | None" = None,
        keeping: Keeping | None = None,
        epoch: int = 0,
        chunk_bytes: int = 1,
    ) -> None:
        self._plan = plan
        self._blocks = blocks
        self._epoch = epoch
        self._holdings = Holdings(plan.contract.chunks)
        self._left = [block for block in blocks if block not in done]
        self._hand_overs = HandOvers(self._holdings, chunk_bytes)
        self._keeping = keeping or Keeping(plan.contract.chunks, chunk_bytes, 0.0)
        self._sweeps: list[Sweep] = []  # of what is kept and of no more use
        self._trips: dict[str, _Trip] = {}
        self._given: dict[str, tuple[int, BlockWork]] = {}  # steps of a block under way
        self._serial = 0
        self._underway = Underway()
        self._steps = itertools.count()
        self._before = before
        self._after: Shard | None = None
        self._shown: set[int] = set()  # chunks that the next shard was shown
        self._nothing_at = -1  # the version at which the block had nothing for anyone
        self.version = 0  # raised whenever there may be something to do that was not before
        if before is not None:
            before._after = self

    @property
    def members(self) -> int:
        return len(self._holdings.paces)

    @property
    def blocks_left(self) -> int:
        return len(self._left)

    def joined(self, worker: int, speed: float = 1.0) -> None:
        self._changed()
        self._holdings.joined(worker, speed)

    def lost(self, worker: int, *, parts_kept: bool) -> list[str]:
        """Whoever it worked for: its results may be of use here."""
        self._changed()
        released = [] if parts_kept else self._hand_overs.lost(worker)
        self._holdings.lost(worker)
        for block in self._underway.both():
            released += block.lost(worker, parts_kept=parts_kept)
        return [*released, *self._underway.fall_back(), *self._let_go()]

    def complete(self) -> bool:
        return not self._left

    def offer(self, worker: int) -> Assignment | None:
        if self.complete() or worker not in self._holdings.paces:
            return None
        block = self._current()
        if (assignment := self._underway.write(worker)) is not None:
            return self._step(worker, assignment)
        if block is None:
            return None
        steps = (
            self._drop_ahead,
            self._hand,
            self._take,
            self._show_before_leaving,
            self._keep_before_leaving,
            self._catch_up,
            self._show,
            self._collect,
            self._adopt,
        )
        for step in steps if block.calibrated else ():
            if (assignment := step(worker, block)) is not None:
                return assignment
        return self._offer_step(worker, block) or self._keep(worker)

    def finished(self, assignment: str, seconds: float) -> list[str]:
        self._changed()
        step = assignment in self._given
        ended = (self._finish_step if step else self._finish_trip)(assignment, seconds)
        return [*ended, *self._let_go()]

    def _finish_trip(self, assignment: str, seconds: float) -> list[str]:
        trip = self._trips.pop(assignment)
        if self.complete():  # by others, meanwhile
            return [assignment]
        each = seconds / max(len(trip.chunks), 1)
        match trip.task:
            case Embed(chunks):
                self._holdings.settle(chunks, trip.worker, 0)
                self._holdings.note(trip.worker, "Embed", each)
            case Advance(index, chunks):
                self._holdings.settle(chunks, trip.worker, index + 1)
                self._holdings.note(trip.worker, "Advance", each)
            case Boundary(chunks=chunks):
                self._shown.update(chunks)
                assert self._after is not None
                return self._after._receive(assignment, trip.worker, chunks)
            case Load(block, chunks):
                self._holdings.settle(chunks, trip.worker, block)
                if block > self._blocks.start:  # too late to be shown
                    self._shown.update(chunks)
            case Keep(block, chunks):
                useless_before = self._keeping.kept(block, chunks, seconds)
                if useless_before is not None:
                    self._sweeps.append(Sweep(self._blocks.start, useless_before))
            case Hand(chunks):
                return self._hand_overs.given(assignment, trip.worker, chunks)
            case Take(chunks):
                return self._hand_overs.taken(trip.worker, chunks, seconds)
            case Drop(chunks):
                self._holdings.orphan(chunks)
        return []

    def returned(self, assignment: str, missing: Collection[str] = ()) -> list[str]:
        self._changed()
        step = assignment in self._given
        ended = (self._return_step if step else self._return_trip)(assignment, missing)
        return [*ended, *self._underway.fall_back(), *self._let_go()]

    def _return_step(self, assignment: str, missing: Collection[str]) -> list[str]:
        _, block = self._given.pop(assignment)
        return block.returned(assignment, missing) if block in self._underway.both() else []

    def _return_trip(self, assignment: str, missing: Collection[str]) -> list[str]:
        trip = self._trips.pop(assignment)
        if isinstance(trip.task, Embed | Load):
            self._holdings.orphan(trip.chunks)
        if isinstance(trip.task, Advance):
            return [name for block in self._underway.both() for name in block.missed(missing)]
        if isinstance(trip.task, Take):
            return self._hand_overs.not_taken(trip.chunks, missing)
        return []  # with its worker's other chunks, if it was lost

    def _changed(self) -> None:
        """Neighbours wait for what this shard shows, and for it to take what they show."""
        for shard in (self, self._before, self._after):
            if shard is not None:
                shard.version += 1

    def _offer_step(self, worker: int, block: BlockWork) -> Assignment | None:
        if self._underway.writing is not None and not block.calibrated:
            return None  # it goes to the store at once, and not before the other
        # it would take longer for one solve than the fastest for all that are left
        slow = self._holdings.slowness(worker) > block.solves_left
        if self._nothing_at == self.version:  # the answer to another worker, the same for all
            return None
        assignment = block.offer(solves=not slow)
        if assignment is not None:
            return self._step(worker, assignment)
        if not slow:
            self._nothing_at = self.version
        return None

    def _step(self, worker: int, assignment: Assignment) -> Assignment:
        block = next(b for b in self._underway.both() if b.gave(assignment.id))
        self._given[assignment.id] = (worker, block)
        return assignment

    def _current(self) -> BlockWork | None:
        """The first block that is not solved; when it is a new one, chunks may change hands."""
        left = self._left if self._underway.writing is None else self._left[1:]
        if self._underway.current is None and left:
            hands = max(1, self.members)
            work = BlockWork(self._plan, left[0], hands, self._epoch, self._steps)
            self._underway.current = work
            self._holdings.rebalance(len(left), self._hand_overs.seconds_each)
            self._keeping.consider(left[0], self._holdings.paces.values())
        return self._underway.current

    def _let_go(self) -> list[str]:
        if self.complete():
            return self._underway.let_go()
        read = {t.task.block for t in self._trips.values() if isinstance(t.task, Advance)}
        return self._underway.let_go(read)

    def _drop_ahead(self, worker: int, block: BlockWork) -> Assignment | None:
        """Chunks that passed a block which is done again."""
        ahead = tuple(c.number for c in self._holdings.held(worker) if c.at > block.index)
        return self._trip(worker, Drop(ahead), ahead) if ahead else None

    def _hand(self, worker: int, _block: BlockWork) -> Assignment | None:
        task = self._hand_overs.leaving(worker)
        if task is None:
            return None
        parts = len(task.chunks) if isinstance(task, Hand) else 0
        return self._trip(worker, task, task.chunks, parts=parts)

    def _take(self, worker: int, _block: BlockWork) -> Assignment | None:
        coming = self._hand_overs.coming(worker)
        if coming is None:
            return None
        task, inputs = coming
        return self._trip(worker, task, task.chunks, inputs=inputs)

    def _catch_up(self, worker: int, block: BlockWork) -> Assignment | None:
        behind = [c for c in self._holdings.held(worker) if NOWHERE < c.at < block.index]
        if not behind:
            return None
        index = min(chunk.at for chunk in behind)
        numbers = tuple(chunk.number for chunk in behind if chunk.at == index)
        published = index >= self._blocks.start
        codes: tuple[Part, ...] = ()
        writing = self._underway.writing
        if writing is not None and index == writing.index:
            if not writing.solved:  # once it is written, by what is in the store
                return None
            codes = writing.codes()
            published = bool(codes)  # else nothing in it is new
        return self._trip(worker, Advance(index, numbers, published), numbers, inputs=codes)

    def _keep_before_leaving(self, worker: int, block: BlockWork) -> Assignment | None:
        held = self._holdings.held(worker)
        return self._keep(worker) if any(c.at < block.index for c in held) else None

    def _keep(self, worker: int) -> Assignment | None:
        """When there is nothing else to do, if the block leaves time for it."""
        if self._sweeps:
            return self._trip(worker, self._sweeps.pop(), ())
        block, numbers = self._keeping.due(self._holdings.held(worker))
        return self._trip(worker, Keep(block, numbers), numbers) if numbers else None

    def _show_before_leaving(self, worker: int, block: BlockWork) -> Assignment | None:
        """Once a chunk has passed a published block, or the shard is done, it is too late."""
        last_chance = block.index > self._blocks.start or len(self._left) == 1
        return self._boundary(worker, self._to_show(worker)[:1] if last_chance else ())

    def _show(self, worker: int, _block: BlockWork) -> Assignment | None:
        """One chunk at a time, and not more than the next shard's workers soon take."""
        after = self._after
        if after is None or after._hand_overs.waiting() >= max(MOST_WAITING * after.members, 1):
            return None
        return self._boundary(worker, self._to_show(worker)[:1])

    def _to_show(self, worker: int) -> tuple[int, ...]:
        if self._after is None or self._after.complete():
            return ()
        here = [c.number for c in self._holdings.held(worker) if c.at == self._blocks.start]
        return tuple(number for number in here if number not in self._shown)

    def _boundary(self, worker: int, numbers: tuple[int, ...]) -> Assignment | None:
        if not numbers:
            return None
        task = Boundary(self._blocks.start, self._blocks.stop, numbers)
        return self._trip(worker, task, numbers, parts=len(numbers))

    def _receive(self, assignment: str, giver: int, chunks: tuple[int, ...]) -> list[str]:
        """Chunks as this shard's inputs, from the one before it, unless they are here already."""
        if self.complete():
            return [assignment]
        here = {chunk.number for chunk in self._holdings.orphans()}
        wanted = {
            number: part
            for part, number in enumerate(chunks)
            if number in here and self._keeping.nearest(number, self._blocks.stop) is None
        }
        return self._hand_overs.shown(assignment, giver, wanted, self._blocks.start)

    def _waits_for(self, number: int, block: int) -> bool:
        """Whether a chunk does better to come from the shard before than to be made here."""
        if self._before is None or self._keeping.nearest(number, block) is not None:
            return False
        return self._before._will_show(number)

    def _will_show(self, number: int) -> bool:
        """Whether the next shard does well to wait for a chunk rather than make it itself."""
        return bool(self._left and self.members) and number not in self._shown

    def _collect(self, worker: int, block: BlockWork) -> Assignment | None:
        here = [c.number for c in self._holdings.held(worker) if c.at == block.index]
        numbers = block.uncollected(here)
        if not numbers:
            return None
        return self._step(worker, block.collect(numbers))

    def _adopt(self, worker: int, block: BlockWork) -> Assignment | None:
        orphans = self._holdings.orphans()
        orphans = [c for c in orphans if not self._waits_for(c.number, block.index)]
        wanted = min(len(orphans), self._holdings.deficit(worker))
        if wanted <= 0:
            return None
        kept = {c.number: self._keeping.nearest(c.number, block.index) for c in orphans[:wanted]}
        start = max(kept.values(), key=lambda at: NOWHERE if at is None else at)
        numbers = tuple(number for number, at in kept.items() if at == start)
        self._holdings.settle(numbers, worker, NOWHERE)
        task = Embed(numbers) if start is None else Load(start, numbers)
        return self._trip(worker, task, numbers)

    def _trip(
        self, worker: int, task: Task, chunks: tuple[int, ...], **options: object
    ) -> Assignment:
        self._serial += 1
        name = f"{type(task).__name__.lower()}/{self._blocks.start}.{self._serial}"
        self._trips[name] = _Trip(worker, task, chunks)
        return Assignment(id=name, task=task, **options)  # type: ignore[arg-type]

    def _finish_step(self, assignment: str, seconds: float) -> list[str]:
        worker, block = self._given.pop(assignment)
        if block not in self._underway.both():  # it was published without, or is done again
            return [assignment]
        step = block.finished(assignment, worker)
        if isinstance(step.task, Collect):
            self._holdings.note(worker, "Collect", seconds / len(step.task.chunks))
        if self._underway.move_on(block):
            self._left.remove(block.index)
        return self._hand_overs.end() if self.complete() else []
