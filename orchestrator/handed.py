"""Results that hold chunks on their way from one worker to another."""

from collections.abc import Collection, Iterable


class Handed:
    """Each until its chunks were taken, or are lost. Lists that are returned need not be kept."""

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
