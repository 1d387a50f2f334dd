"""GPTQ's column sweep in plain torch.

For columns i in order, with U upper triangular (U^T U = H^-1):

    q_i = code of w_i;   e_i = (w_i - value(q_i)) / U[i, i];   w_j -= U[i, j] e_i   for j > i

With V = U^-1, upper triangular too (V V^T = H), and d_i = w_i - value(q_i) taken from the
weights as they were given, trace(d H d^T) = |d V|^2, and rounding each column so that its own
term is least is the same sweep:

    q_i = code of w_i + (sum over k < i of V[k, i] d_k) / V[i, i]

The update of far columns is delayed to one matrix product per block of columns
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323, section 3.2, "lazy batch-updates").

Weights are kept transposed, (I, O): a column of the layer is then one run of memory.
Shape suffixes: O = rows of the layer, I = its inputs in the order of rounding, G = groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkernels.grids import ROUND, GridName, Rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A grid, looked up by position in the order of rounding."""

    grid: GridName = "affine"
    scale_GO: Tensor  # float32
    zero_GO: Tensor  # float32; of an affine grid whole numbers, of float8 not looked at
    group_of_I: Tensor  # int64: the group of the i-th column to be rounded
    qmin: int
    qmax: int

    def nearest(self, w_O: Tensor, group: int) -> Rounded:
        ends = (self.qmin, self.qmax)
        return ROUND[self.grid](w_O, self.scale_GO[group], self.zero_GO[group], ends)


def sweep(w_IO: Tensor, upper_II: Tensor, columns: Columns, block_columns: int) -> Tensor:
    """Codes, int8 (I, O). `w_IO` (float32, contiguous) is used up as scratch space."""
    width, rows = w_IO.shape
    codes_IO = torch.empty(width, rows, dtype=torch.int8, device=w_IO.device)
    group_of_I = columns.group_of_I.tolist()
    pivot_I = upper_II.diagonal().tolist()
    for start in range(0, width, block_columns):
        stop = min(start + block_columns, width)
        error_BO = torch.empty_like(w_IO[start:stop])
        for i in range(start, stop):
            w_O = w_IO[i]
            rounded = columns.nearest(w_O, group_of_I[i])
            codes_IO[i] = rounded.codes
            error_O = error_BO[i - start]
            torch.sub(w_O, rounded.values, out=error_O)
            error_O /= pivot_I[i]
            if i + 1 < stop:
                w_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], error_O, alpha=-1)
        if stop < width:
            w_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), error_BO, alpha=-1)
    return codes_IO


def sweep_by_root(w_IO: Tensor, root_II: Tensor, columns: Columns, block_columns: int) -> Tensor:
    width, rows = w_IO.shape
    codes_IO = torch.empty(width, rows, dtype=torch.int8, device=w_IO.device)
    owed_IO = torch.zeros_like(w_IO)  # the sum over k, as far as it is known
    group_of_I = columns.group_of_I.tolist()
    pivot_I = root_II.diagonal().tolist()
    for start in range(0, width, block_columns):
        stop = min(start + block_columns, width)
        for i in range(start, stop):
            moved_O = w_IO[i] + owed_IO[i] / pivot_I[i]
            rounded = columns.nearest(moved_O, group_of_I[i])
            codes_IO[i] = rounded.codes
            w_IO[i] -= rounded.values
            if i + 1 < stop:
                owed_IO[i + 1 : stop].addr_(root_II[i, i + 1 : stop], w_IO[i])
        if stop < width:
            owed_IO[stop:].addmm_(root_II[start:stop, stop:].t(), w_IO[start:stop])
    return codes_IO
