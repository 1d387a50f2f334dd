"""X^T X of a batch of layer inputs."""

import torch
from torch import Tensor

from quantkernels.gram import reference

FUSED_DEVICES = ("cuda", "xpu")
FUSED_DTYPES = (torch.bfloat16, torch.float16)

__all__ = ["gram", "gram_of_finite"]


def gram(x_TI: Tensor, out_II: Tensor) -> Tensor:
    """Add X^T X into the lower triangle of `out_II` (float32, (I, I)) and return it.

    `x_TI` is float32, bfloat16 or float16, any strides, T rows. Its products are exact in
    float32 whatever its dtype; the sum runs in float32. What stands above the diagonal afterwards
    has no meaning.
    """
    if _fused(x_TI):
        from quantkernels.gram import fused

        return fused.gram(x_TI, out_II)
    return reference.gram(x_TI, out_II)


def gram_of_finite(x_TI: Tensor, out_II: Tensor) -> Tensor:
    """As `gram`, without the rows that hold a NaN or an infinity; how many those were.

    The count is an int64 scalar on x's own device: nobody waits for it here.
    """
    if _fused(x_TI):
        from quantkernels.gram import fused

        return fused.gram_of_finite(x_TI, out_II)
    return reference.gram_of_finite(x_TI, out_II)


def _fused(x_TI: Tensor) -> bool:
    return x_TI.device.type in FUSED_DEVICES and x_TI.dtype in FUSED_DTYPES
