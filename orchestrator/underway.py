"""The block that a shard works on, and the one before it on its way to the store.

A solved block is written by one worker while the others go on with the next. One is written at a
time, in order, so that the ledger has no gaps. Where the codes of one that is not written yet are
lost, it is the block to work on again, and what was done of the next is void: two blocks at most.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from orchestrator.block import BlockWork
from orchestrator.scheduler import Assignment


@dataclass(slots=True)
class Underway:
    current: BlockWork | None = None
    writing: BlockWork | None = None
    _unread: dict[int, list[str]] = field(default_factory=dict)  # results of blocks in the store

    def both(self) -> list[BlockWork]:
        return [block for block in (self.writing, self.current) if block is not None]

    def write(self, worker: int) -> Assignment | None:
        """Begin to write, or hear how that ended, once somebody waits for it."""
        if self.writing is None:
            return None
        after = self.current
        waited_for = after is None or after.passed or not after.calibrated
        return self.writing.write(worker, due=waited_for or not self.writing.solved)

    def move_on(self, block: BlockWork) -> bool:
        """After a step of a block: whether it is now in the store."""
        if block.published:
            self._unread[block.index] = block.results()
            if block is self.writing:
                self.writing = None
            else:
                self.current = None
        if self.writing is None and self.current is not None and self.current.passed:
            self.writing, self.current = self.current, None
        return block.published

    def fall_back(self) -> list[str]:
        """The results that are void, if the block to be written has to be done again."""
        if self.writing is None or self.writing.passed:
            return []
        void = [] if self.current is None else self.current.results()
        self.current, self.writing = self.writing, None
        return void

    def let_go(self, still_read: Collection[int] = ()) -> list[str]:
        """Results of blocks in the store, but of those by which chunks are on their way."""
        free = [block for block in self._unread if block not in still_read]
        return [name for block in free for name in self._unread.pop(block)]
