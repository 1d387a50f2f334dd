"""Sums of x x^T over calibration tokens, and the Hessian that they amount to.

Their order is fixed by the tree (tree.py). Shape suffixes: T = tokens, I = in_features.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from quantkernels.gram import gram
from torch import Tensor

from quantcore.tree import Tree


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


def moment_tree(chunks: int, width: int, device: torch.device) -> Tree[Moments]:
    return Tree(chunks, lambda: Moments(torch.zeros(width, width, device=device)))
