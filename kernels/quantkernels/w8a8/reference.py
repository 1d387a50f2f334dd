"""The same in plain torch, sums in float32: exact for whole codes of up to 2**24 in sum."""

import torch
from torch import Tensor

from quantkernels.w8a8.weight import Weight8


def linear(
    codes_TI: Tensor,
    scale_T: Tensor,
    weight: Weight8,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y_TO = (codes_TI.float() @ values(weight).t()) * scale_T.reshape(-1, 1)
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(dtype)


def values(weight: Weight8) -> Tensor:
    """float32 (O, I)."""
    codes_OI = weight.codes_OI
    q_OI = codes_OI.view(torch.float8_e4m3fn) if weight.kind == "float8" else codes_OI
    return q_OI.float() * weight.scale_O.float()[:, None]
