"""Scale and zero point of every group of a weight: from its extremes, or searched."""

from torch import Tensor

from quantkernels.ranges import reference
from quantkernels.ranges.reference import AffineRange, extremes

FUSED_DEVICES = ("cuda", "xpu")

__all__ = ["AffineRange", "extremes", "search"]


def search(
    w_OGI: Tensor, importance_GI: Tensor, kind: AffineRange, shrink_S: Tensor
) -> tuple[Tensor, Tensor]:
    """The range that makes sum(importance * (w - value)**2) least, group by group.

    Each group's extremes are tried whole and shrunk by every factor of `shrink_S` (float32, the
    first of them 1); of equal errors the first wins. Gives the scale, float32 (O, G), and the zero
    point, int8 (O, G); a float zero point as float32.
    """
    if w_OGI.device.type in FUSED_DEVICES:
        from quantkernels.ranges import fused

        return fused.search(w_OGI, importance_GI, kind, shrink_S)
    return reference.search(w_OGI, importance_GI, kind, shrink_S)
