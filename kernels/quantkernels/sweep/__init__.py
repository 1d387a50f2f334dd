"""The inner loop of GPTQ: round column after column and hand each column's error on."""

from torch import Tensor

from quantkernels.sweep import reference
from quantkernels.sweep.reference import Columns

FUSED_DEVICES = ("cuda", "xpu")

__all__ = ["FUSED_DEVICES", "Columns", "sweep", "sweep_by_root"]


def sweep(w_IO: Tensor, upper_II: Tensor, columns: Columns, block_columns: int) -> Tensor:
    """Codes, int8 (I, O), by the inverse's factor: U^T U = H^-1.

    `w_IO` (float32, contiguous) is used up as scratch space. Plain torch on any device.
    """
    return reference.sweep(w_IO, upper_II, columns, block_columns)


def sweep_by_root(w_IO: Tensor, root_II: Tensor, columns: Columns, block_columns: int) -> Tensor:
    """The same codes by the factor of H itself, V V^T = H, which needs no inverse.

    `w_IO` (float32, contiguous) is used up as scratch space. A row's codes do not depend on the
    rows beside it on a GPU; in plain torch they do where a product rounds by its height.
    """
    if w_IO.device.type in FUSED_DEVICES:
        from quantkernels.sweep import fused

        return fused.sweep_by_root(w_IO, root_II, columns, block_columns)
    return reference.sweep_by_root(w_IO, root_II, columns, block_columns)
