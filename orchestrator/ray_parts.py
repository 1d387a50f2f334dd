"""Where results' parts are, and the way from there to whoever reads them.

A CPU's parts go to Ray's object store. Those of an accelerator stay with the worker that made them,
on its device: it reads them itself as they are; a worker on another GPU of the same machine is lent
its memory; to all others they are sent through the object store, once they are asked for.
"""

from dataclasses import dataclass
from typing import Any, Protocol


class Maker(Protocol):
    """What is to be known of a worker, of one with parts and of one that reads them."""

    actor: Any
    node: str
    gpu: str  # its own, by the name that is its alone; empty for others
    sees: tuple[str, ...]  # the GPUs whose memory it can be lent


@dataclass(frozen=True, slots=True)
class Own:
    """A part that the reader has itself."""

    assignment: str
    part: int


def stays(device: str) -> bool:
    """Whether parts stay where they are made."""
    return device != "cpu"


class Parts:
    def __init__(self) -> None:
        self._refs: dict[str, list[Any]] = {}  # in the object store
        self._makers: dict[str, Maker] = {}  # of parts that stay

    def put(self, assignment: str, refs: list[Any]) -> None:
        self._refs[assignment] = refs

    def stay(self, assignment: str, maker: Maker) -> None:
        self._makers[assignment] = maker

    def input_for(self, reader: Maker, assignment: str, part: int) -> Any:
        """A reference that becomes the part, or a word that the reader has it."""
        maker = self._makers.get(assignment)
        if maker is None:
            return self._refs[assignment][part]
        if maker.actor is reader.actor:
            return Own(assignment, part)
        near = maker.node == reader.node and maker.gpu and maker.gpu in reader.sees
        way = maker.actor.lend if near else maker.actor.send
        return way.options(concurrency_group="parts").remote(assignment, part)

    def release(self, assignment: str) -> None:
        self._refs.pop(assignment, None)
        if maker := self._makers.pop(assignment, None):
            maker.actor.drop.options(concurrency_group="parts").remote(assignment)

    def lost(self, gone: Maker) -> bool:
        """Forget what a worker had that is no more. Whether others can still be read is asked."""
        lost = [name for name, maker in self._makers.items() if maker.actor is gone.actor]
        for name in lost:
            del self._makers[name]
        return bool(lost)

    def clear(self) -> None:
        self._refs.clear()
        self._makers.clear()
