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


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineColumns:
    """An affine grid, looked up by position in the order of rounding."""

    scale_GO: Tensor  # float32
    zero_GO: Tensor  # float32, whole numbers
    group_of_I: Tensor  # int64: the group of the i-th column to be rounded
    qmin: int
    qmax: int


def sweep(w_IO: Tensor, upper_II: Tensor, columns: AffineColumns, block_columns: int) -> Tensor:
    """Codes, int8 (I, O). `w_IO` (float32, contiguous) is used up as scratch space."""
    width, rows = w_IO.shape
    codes_IO = torch.empty(width, rows, dtype=torch.int8, device=w_IO.device)
    group_of_I = columns.group_of_I.tolist()
    pivot_I = upper_II.diagonal().tolist()
    for start in range(0, width, block_columns):
        stop = min(start + block_columns, width)
        error_BO = torch.empty_like(w_IO[start:stop])
        for i in range(start, stop):
            scale_O = columns.scale_GO[group_of_I[i]]
            zero_O = columns.zero_GO[group_of_I[i]]
            w_O = w_IO[i]
            code_O = (w_O / scale_O).round_().add_(zero_O).clamp_(columns.qmin, columns.qmax)
            codes_IO[i] = code_O
            error_O = error_BO[i - start]
            torch.sub(w_O, code_O.sub_(zero_O).mul_(scale_O), out=error_O)
            error_O /= pivot_I[i]
            if i + 1 < stop:
                w_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], error_O, alpha=-1)
        if stop < width:
            w_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), error_BO, alpha=-1)
    return codes_IO


def sweep_by_root(
    w_IO: Tensor, root_II: Tensor, columns: AffineColumns, block_columns: int
) -> Tensor:
    width, rows = w_IO.shape
    codes_IO = torch.empty(width, rows, dtype=torch.int8, device=w_IO.device)
    owed_IO = torch.zeros_like(w_IO)  # the sum over k, as far as it is known
    group_of_I = columns.group_of_I.tolist()
    pivot_I = root_II.diagonal().tolist()
    for start in range(0, width, block_columns):
        stop = min(start + block_columns, width)
        for i in range(start, stop):
            scale_O = columns.scale_GO[group_of_I[i]]
            zero_O = columns.zero_GO[group_of_I[i]]
            moved_O = w_IO[i] + owed_IO[i] / pivot_I[i]
            code_O = (moved_O / scale_O).round_().add_(zero_O).clamp_(columns.qmin, columns.qmax)
            codes_IO[i] = code_O
            w_IO[i] -= code_O.sub_(zero_O).mul_(scale_O)
            if i + 1 < stop:
                owed_IO[i + 1 : stop].addr_(root_II[i, i + 1 : stop], w_IO[i])
        if stop < width:
            owed_IO[stop:].addmm_(root_II[start:stop, stop:].t(), w_IO[start:stop])
    return codes_IO
