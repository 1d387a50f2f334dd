"""The same in plain torch, operation by operation as transformers' modules have them."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_I: Tensor, eps: float, form: str) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if form == "offset":
        return (normed * (1.0 + weight_I.float())).to(x.dtype)
    return weight_I * normed.to(x.dtype)


def rotated(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    first, second = x_BHLD.chunk(2, dim=-1)
    turned_BHLD = torch.cat((-second, first), dim=-1)
    return (x_BHLD * cos_BLD[:, None]) + (turned_BHLD * sin_BLD[:, None])


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up
