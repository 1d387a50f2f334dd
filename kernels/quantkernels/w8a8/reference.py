"""The same in plain torch, sums in float32: exact for whole codes of up to 2**24 in sum."""

import torch
from torch import Tensor

from quantkernels.w8a8.tiles import Tiles8, unpack_codes, unpack_groups


def linear(
    codes_TI: Tensor,
    scale_T: Tensor,
    zero_T: Tensor | None,
    weight: Tiles8,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    q_TI = codes_TI.float()
    if zero_T is not None:
        q_TI = q_TI - zero_T.reshape(-1, 1)
    y_TO = (q_TI @ values(weight).t()) * scale_T.reshape(-1, 1)
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(dtype)


def values(weight: Tiles8) -> Tensor:
    """float32 (O, I)."""
    codes_OI = weight.codes
    if weight.tiled:
        codes_OI = unpack_codes(weight.codes, weight.kind, weight.features)
    q_OI = (
        codes_OI.view(torch.float8_e4m3fn).float() if weight.kind == "float8" else codes_OI.float()
    )
    scale_OG = unpack_groups(weight.scale.float(), weight.features, weight.group or None)
    if weight.group:
        scale_OG = scale_OG.repeat_interleave(weight.group, dim=1)[:, : weight.features[1]]
    return q_OI * scale_OG
