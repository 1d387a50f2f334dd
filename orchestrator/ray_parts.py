"""Where results' parts are, and the way from there to whoever reads them.

A CPU's parts go to Ray's object store. Those of an accelerator stay with the worker that made them,
on its device (workers/kept.py): it copies them when it reads them, and so does a worker on another
GPU of the same machine, out of its memory; to all others they are sent through the object store,
once they are asked for.

Parts that turn out to be gone, with their node, are made again. What does not fit in the object
store Ray writes to its node's disk; where that is full too, the job ends.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from workers.kept import Near, Own, regions_of


class Maker(Protocol):
    """What is to be known of a worker, of one with parts and of one that reads them."""

    number: int
    actor: Any
    node: str
    gpu: str  # its own, by the name that is its alone; empty for others
    sees: tuple[str, ...]  # the GPUs whose memory it can map


def stays(device: str) -> bool:
    """Whether parts stay where they are made."""
    return device != "cpu"


class Parts:
    def __init__(self) -> None:
        self._refs: dict[str, list[Any]] = {}  # in the object store
        self._makers: dict[str, Maker] = {}  # of parts that stay
        # where those are in memory that others can map; None: they are not
        self._placed: dict[str, tuple[Any, ...] | None] = {}
        self._mapped: set[tuple[int, int, int]] = set()  # reader, maker, slab

    def put(self, assignment: str, refs: list[Any]) -> None:
        self._refs[assignment] = refs

    def stay(self, assignment: str, maker: Maker, placed: tuple[Any, ...] | None) -> None:
        self._makers[assignment], self._placed[assignment] = maker, placed

    def input_for(self, reader: Maker, assignment: str, part: int) -> Any:
        """What the reader is handed: a reference that becomes the part, or where the part is."""
        maker = self._makers.get(assignment)
        if maker is None:
            return self._refs[assignment][part]
        if maker.number == reader.number:
            return Own(assignment, part)
        placed = self._placed[assignment]
        sees = maker.node == reader.node and maker.gpu and maker.gpu in reader.sees
        if placed is not None and sees:
            return self._near(reader, maker, placed[part])
        return _asked(maker, "send", assignment, part)

    def _near(self, reader: Maker, maker: Maker, placed: Any) -> Near:
        slabs = {region.slab for region in regions_of(placed)}
        new = (s for s in slabs if (reader.number, maker.number, s) not in self._mapped)
        return Near(maker.number, placed, {slab: _asked(maker, "lend", slab) for slab in new})

    def read(self, reader: Maker, inputs: Iterable[Any]) -> None:
        """A worker has read all this, and has the slabs mapped."""
        for given in inputs:
            if isinstance(given, Near):
                self._mapped.update((reader.number, given.maker, slab) for slab in given.slabs)

    def release(self, assignment: str) -> None:
        self._refs.pop(assignment, None)
        self._placed.pop(assignment, None)
        if maker := self._makers.pop(assignment, None):
            _asked(maker, "drop", assignment)

    def lost(self, gone: Maker) -> bool:
        """Forget what a worker had that is no more. Whether others can still be read is asked."""
        lost = [name for name, maker in self._makers.items() if maker.number == gone.number]
        for name in lost:
            del self._makers[name], self._placed[name]
        return bool(lost)

    def clear(self) -> None:
        self._refs.clear()
        self._makers.clear()
        self._placed.clear()


def _asked(maker: Maker, what: str, *about: Any) -> Any:
    return getattr(maker.actor, what).options(concurrency_group="parts").remote(*about)
