"""A model that lies far away, with one block's tensors at hand and the next ones on their way.

A block's weights are wanted several times, and fetched once. A tensor can be used as soon as it is
there, whatever is still to come of its block. On an accelerator resident.py does the like with
the blocks of a shard. Of blocks that are dealt to whoever is free only the one at hand is read
ahead: which one comes next is not known.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from workers.sources import ModelSource


class ReadAhead:
    """As the source it stands before; what it holds is not fetched again."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._fetched: list[_Fetched] = []  # the block that is held, and the one to come

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def hold(self, names: Iterable[str], coming: Iterable[str] = ()) -> None:
        """Fetch these tensors and then those to come, unless they are here; drop all others."""
        wanted = [frozenset(part) for part in (names, coming)]
        for fetched in self._fetched:
            if fetched.names not in wanted:
                fetched.drop()
        kept = {fetched.names: fetched for fetched in self._fetched if not fetched.dropped}
        self._fetched = [kept.get(part) or self._begun(part) for part in wanted if part]

    def release(self) -> None:
        self.hold(())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        here = {name: tensor for f in self._fetched for name, tensor in f.tensors.items()}
        elsewhere = []
        for name in names:
            if name in here:
                yield name, here[name].result()
            else:
                elsewhere.append(name)
        yield from self._source.read(elsewhere)

    def _begun(self, names: frozenset[str]) -> "_Fetched":
        fetched = _Fetched(names)
        self._reader.submit(fetched.fetch, self._source)
        return fetched


class _Fetched:
    """Some tensors on their way. An error is raised for whoever reads them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.tensors: dict[str, Future[Tensor]] = {name: Future() for name in names}
        self.dropped = False

    def drop(self) -> None:
        """What is still to come does not."""
        self.dropped = True
        self.tensors = {}

    def fetch(self, source: ModelSource) -> None:
        tensors = self.tensors
        try:
            for name, tensor in source.read(tensors):
                if self.dropped:
                    return
                tensors[name].set_result(tensor)
        except Exception as error:
            for waiting in tensors.values():
                if not waiting.done():
                    waiting.set_exception(error)
