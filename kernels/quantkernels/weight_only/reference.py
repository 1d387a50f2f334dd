"""The same in plain torch: unpack, make dense, multiply."""

import torch
from torch import Tensor

from quantkernels import grids
from quantkernels.weight_only.tiles import Tiles, unpack_codes, unpack_groups


def linear(x_TI: Tensor, weight: Tiles, bias_O: Tensor | None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    return torch.nn.functional.linear(x_TI, dense(weight, x_TI.dtype), bias_O)


def dense(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """The weight's values (O, I), rounded to the dtype once."""
    codes_OI = unpack_codes(weight.codes_RPBW, weight.kind, weight.features)
    scale_OI = _spread(weight, weight.scale)
    zero_OI = torch.zeros((), device=codes_OI.device)
    if weight.zero is not None:
        zero_OI = _spread(weight, weight.zero)
    return grids.values(weight.grid, codes_OI, scale_OI, zero_OI).to(dtype)


def _spread(weight: Tiles, packed: Tensor) -> Tensor:
    values_OG = unpack_groups(packed, weight.features, weight.group or None)
    if not weight.group:
        return values_OG
    return values_OG.repeat_interleave(weight.group, dim=1)[:, : weight.features[1]]
