"""Sums of x x^T over calibration tokens, and the Hessian that they amount to.

Their order is fixed by the tree (tree.py). Shape suffixes: T = tokens, I = in_features.
"""

import itertools
import math

import torch
from quantkernels.gram import gram_of_finite
from torch import Tensor

from quantcore.tree import Tree


def band_rows(width: int, bands: int) -> list[tuple[int, int]]:
    """Rows [first, last) that cut a square matrix's lower triangle into bands of like area."""
    cuts = [round(width * math.sqrt(band / bands)) for band in range(bands + 1)]
    return list(itertools.pairwise(cuts))


class Moments:
    """What one LinearGroup's inputs amount to: a sum of x x^T and what went into it.

    How many tokens were left out is counted where they are, and read when somebody asks.
    """

    __slots__ = ("_dropped", "_seen", "sum_II")

    def __init__(self, sum_II: Tensor, tokens: int = 0, dropped: int = 0) -> None:
        self.sum_II = sum_II  # float32; the lower triangle counts
        self._seen = tokens + dropped
        self._dropped: int | Tensor = dropped

    @property
    def tokens(self) -> int:
        return self._seen - self.dropped

    @property
    def dropped(self) -> int:
        """Tokens left out because a value in them was not finite."""
        self._dropped = int(self._dropped)
        return self._dropped

    def add(self, x_TI: Tensor) -> None:
        """Add tokens in place. A token with a value that is not finite is left out and counted."""
        self._dropped = self._dropped + gram_of_finite(x_TI, self.sum_II)
        self._seen += len(x_TI)

    def merged(self, later: "Moments") -> "Moments":
        merged = Moments(self.sum_II + later.sum_II)
        merged._seen = self._seen + later._seen
        merged._dropped = self._dropped + later._dropped
        return merged

    def mean(self) -> Tensor:
        """H = the mean of x x^T, symmetric, float32 (I, I)."""
        lower_II = self.sum_II.tril() / max(self.tokens, 1)
        return lower_II + lower_II.tril(-1).t()


def moment_tree(chunks: int, width: int, device: torch.device) -> Tree[Moments]:
    return Tree(chunks, lambda: Moments(torch.zeros(width, width, device=device)))
