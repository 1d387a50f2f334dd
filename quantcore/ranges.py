"""What range each input of a LinearGroup takes over the calibration tokens, and some of the tokens.

Extremes merge in any order; the tokens that are kept as a sample are those at fixed places of
each micro-batch, in the order of the fixed tree (tree.py). So both are the same whoever adds them.

Shape suffixes: T = tokens, I = in_features, S = tokens of the sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.tree import Tree


@dataclass(slots=True)
class Ranges:
    low_I: Tensor  # float32, at most 0
    high_I: Tensor  # float32, at least 0
    sample_SI: Tensor  # float32
    rows: int  # of each micro-batch that go into the sample
    tokens: int = 0
    dropped: int = 0  # tokens left out because a value in them was not finite

    def add(self, x_TI: Tensor) -> None:
        """Add tokens in place. A token with a value that is not finite is left out and counted."""
        finite_T = x_TI.isfinite().all(dim=1)
        kept = int(finite_T.sum().item())
        if kept < len(x_TI):
            x_TI = x_TI[finite_T]
        self.tokens += kept
        self.dropped += len(finite_T) - kept
        if not kept:
            return
        self.low_I = torch.minimum(self.low_I, x_TI.amin(0).float())
        self.high_I = torch.maximum(self.high_I, x_TI.amax(0).float())
        places = [row * kept // self.rows for row in range(min(self.rows, kept))]
        self.sample_SI = torch.cat([self.sample_SI, x_TI[places].float()])

    def merged(self, later: "Ranges") -> "Ranges":
        return Ranges(
            torch.minimum(self.low_I, later.low_I),
            torch.maximum(self.high_I, later.high_I),
            torch.cat([self.sample_SI, later.sample_SI]),
            self.rows,
            self.tokens + later.tokens,
            self.dropped + later.dropped,
        )

    def largest(self) -> Tensor:
        """The largest magnitude that each input took, float32 (I,)."""
        return torch.maximum(-self.low_I, self.high_I)


def range_tree(chunks: int, width: int, rows: int, device: torch.device) -> Tree[Ranges]:
    """`rows` of each micro-batch go into the sample."""

    def new() -> Ranges:
        zeros_I = torch.zeros(width, device=device)
        return Ranges(zeros_I, zeros_I, torch.zeros(0, width, device=device), rows)

    return Tree(chunks, new)
