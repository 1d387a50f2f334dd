"""Sums over calibration tokens that come out the same whoever adds them.

Floating-point addition is not associative, so the order of every addition is fixed when the job
is planned: micro-batches are added in order within a chunk, and chunks along one binary tree
over their numbers. A worker that holds chunks [a, b) adds up as much of that tree as lies within
its range; `total` finishes it. One worker, or eight, or a resumed job: the same additions.

What is added up is a statistic: `Moments` (moments.py) or `Ranges` (ranges.py).

Shape suffixes: T = tokens, I = in_features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

Span = tuple[int, int]  # chunks [first, last)


class Statistic(Protocol):
    def add(self, x_TI: Tensor) -> None:
        """Add tokens in place."""
        ...

    def merged(self, later: Self) -> Self: ...


S = TypeVar("S", bound=Statistic)


def fixed_tree(chunks: int) -> dict[Span, int]:
    """Every inner node of the tree over `chunks` leaves, with the chunk that splits it.

    A span is split at the largest power of two under its length.
    """
    splits: dict[Span, int] = {}
    todo = [(0, chunks)]
    while todo:
        first, last = todo.pop()
        if last - first > 1:
            middle = first + (1 << (last - first - 1).bit_length() - 1)
            splits[first, last] = middle
            todo += [(first, middle), (middle, last)]
    return splits


@dataclass(slots=True)
class Tree(Generic[S]):
    """The part of the fixed tree that one worker can add up, built chunk after chunk."""

    chunks: int
    new: Callable[[], S]  # a chunk's statistic, before its first token
    nodes: dict[Span, S] = field(default_factory=dict)
    _splits: dict[Span, int] = field(init=False)
    _open: int | None = None

    def __post_init__(self) -> None:
        self._splits = fixed_tree(self.chunks)

    def add(self, chunk: int, x_TI: Tensor) -> None:
        """Add one micro-batch's inputs to its chunk; chunks come in rising order."""
        if chunk != self._open:
            self.close()
            self._open = chunk
            self.nodes[chunk, chunk + 1] = self.new()
        self.nodes[chunk, chunk + 1].add(x_TI)

    def close(self) -> None:
        """The open chunk is complete: merge it with its finished siblings, upwards."""
        if self._open is None:
            return
        span = (self._open, self._open + 1)
        self._open = None
        while (left := self._finished_left_sibling(span)) is not None:
            later = self.nodes.pop(span)
            span = (left[0], span[1])
            self.nodes[span] = self.nodes.pop(left).merged(later)

    def _finished_left_sibling(self, span: Span) -> Span | None:
        for left in self.nodes:
            if left[1] == span[0] and self._splits.get((left[0], span[1])) == span[0]:
                return left
        return None


def total(nodes: Mapping[Span, S], chunks: int) -> S:
    """Finish the tree from the nodes that all the workers hold between them."""
    return _below((0, chunks), nodes, fixed_tree(chunks))


def _below(span: Span, nodes: Mapping[Span, S], splits: Mapping[Span, int]) -> S:
    """One node of the tree. No closure: one that calls itself would keep all nodes from going."""
    if span in nodes:
        return nodes[span]
    left, right = (span[0], splits[span]), (splits[span], span[1])
    return _below(left, nodes, splits).merged(_below(right, nodes, splits))
