"""When the chunks' hidden states are worth keeping in the store, and which are kept there.

Without that a lost chunk is made again from the texts, through every block before. Keeping costs
time as well. With losses at a rate of L a second, keeping taking K seconds and a replay going at
f times the speed of the work itself, the time lost is least when chunks are kept as often as

    the replay since the last time would take sqrt(2 K f / L) seconds

(Young 1974, "A first order approximation to the optimum checkpoint interval").
"""

import math
from collections.abc import Collection, Iterable

from orchestrator.holdings import Chunk, Pace

_STORE_BYTES_PER_S = 100e6  # until chunks were kept once
_SECONDS_A_DAY = 86400.0


class Keeping:
    """`there` holds (block, chunk) of what earlier drivers kept: states as inputs of the block."""

    def __init__(
        self,
        chunks: int,
        chunk_bytes: int,
        losses_per_day: float,
        there: Collection[tuple[int, int]] = (),
    ) -> None:
        self._chunks = chunks
        self._chunk_bytes = chunk_bytes
        self._rate = losses_per_day / _SECONDS_A_DAY  # of each worker
        self._there = set(there)
        self._bytes_per_s = _STORE_BYTES_PER_S
        self._mark: int | None = None

    def consider(self, block: int, paces: Collection[Pace]) -> None:
        """At the beginning of a block: decide whether its inputs are to be kept."""
        known = [pace for pace in paces if pace.per_block()]
        last = max((b for b, _ in self._there if b <= block and self._whole(b)), default=0)
        if not known or not self._rate or last == block:
            return
        each = self._chunks / len(paces)  # chunks of one worker
        advance_s = sum(pace.seconds["Advance"] for pace in known) / len(known)
        block_s = sum(pace.per_block() or 0.0 for pace in known) / len(known)
        replay_s = (block - last) * advance_s * each
        keep_s = self._chunk_bytes * each / self._bytes_per_s
        share = advance_s / block_s
        if replay_s >= math.sqrt(2 * keep_s * share / (self._rate * len(paces))):
            self._mark = block

    def due(self, held: Iterable[Chunk]) -> tuple[int, tuple[int, ...]]:
        """The block and those of a worker's chunks that are to be kept as its inputs."""
        mark = self._mark
        if mark is None:
            return 0, ()
        numbers = (chunk.number for chunk in held if chunk.at == mark)
        return mark, tuple(number for number in numbers if (mark, number) not in self._there)

    def kept(self, block: int, chunks: Collection[int], seconds: float) -> int | None:
        """Some chunks are kept; the block before which nothing is of use any more, if any."""
        self._there.update((block, chunk) for chunk in chunks)
        measured = self._chunk_bytes * len(chunks) / max(seconds, 1e-6)
        self._bytes_per_s = (self._bytes_per_s + measured) / 2
        older = {(b, chunk) for b, chunk in self._there if b < block}
        if not older or not self._whole(block):
            return None
        self._there -= older
        return block

    def nearest(self, chunk: int, block: int) -> int | None:
        """The last block up to `block` whose input a chunk is kept as."""
        return max((b for b, number in self._there if number == chunk and b <= block), default=None)

    def _whole(self, block: int) -> bool:
        return sum(b == block for b, _ in self._there) == self._chunks
