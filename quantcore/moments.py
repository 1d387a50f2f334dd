"""Sums of x x^T over calibration tokens that come out the same whoever adds them.

Floating-point addition is not associative, so the order of every addition is fixed when the job
is planned: micro-batches are added in order within a chunk, and chunks along one binary tree
over their numbers. A worker that holds chunks [a, b) adds up as much of that tree as lies within
its range; `total` finishes it. One worker, or eight, or a resumed job: the same additions.

Shape suffixes: T = tokens, I = in_features.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from quantkernels.gram import gram
from torch import Tensor

Span = tuple[int, int]  # chunks [first, last)


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


def band_rows(width: int, bands: int) -> list[tuple[int, int]]:
    """Rows [first, last) that cut a square matrix's lower triangle into bands of like area."""
    cuts = [round(width * math.sqrt(band / bands)) for band in range(bands + 1)]
    return list(itertools.pairwise(cuts))


@dataclass(slots=True)
class Moments:
    """What one LinearGroup's inputs amount to: a sum of x x^T and what went into it."""

    sum_II: Tensor  # float32; the lower triangle counts
    tokens: int = 0
    dropped: int = 0  # tokens left out because a value in them was not finite

    def add(self, x_TI: Tensor) -> None:
        """Add tokens in place. A token with a value that is not finite is left out and counted."""
        finite_T = x_TI.isfinite().all(dim=1)
        kept = int(finite_T.sum().item())
        if kept < len(x_TI):
            x_TI = torch.where(finite_T[:, None], x_TI, 0)
        gram(x_TI, self.sum_II)
        self.tokens += kept
        self.dropped += len(x_TI) - kept

    def merged(self, later: "Moments") -> "Moments":
        return Moments(
            self.sum_II + later.sum_II,
            self.tokens + later.tokens,
            self.dropped + later.dropped,
        )

    def mean(self) -> Tensor:
        """H = the mean of x x^T, symmetric, float32 (I, I)."""
        lower_II = self.sum_II.tril() / max(self.tokens, 1)
        return lower_II + lower_II.tril(-1).t()


@dataclass(slots=True)
class MomentTree:
    """The part of the fixed tree that one worker can add up, built chunk after chunk."""

    chunks: int
    width: int
    device: torch.device
    nodes: dict[Span, Moments] = field(default_factory=dict)
    _splits: dict[Span, int] = field(init=False)
    _open: int | None = None

    def __post_init__(self) -> None:
        self._splits = fixed_tree(self.chunks)

    def add(self, chunk: int, x_TI: Tensor) -> None:
        """Add one micro-batch's inputs to its chunk; chunks come in rising order."""
        if chunk != self._open:
            self.close()
            self._open = chunk
            zeros_II = torch.zeros(self.width, self.width, device=self.device)
            self.nodes[chunk, chunk + 1] = Moments(zeros_II)
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


def total(nodes: Mapping[Span, Moments], chunks: int) -> Moments:
    """Finish the tree from the nodes that all the workers hold between them."""
    splits = fixed_tree(chunks)

    def of(span: Span) -> Moments:
        if span in nodes:
            return nodes[span]
        middle = splits[span]
        return of((span[0], middle)).merged(of((middle, span[1])))

    return of((0, chunks))
