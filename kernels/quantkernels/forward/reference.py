"""The same in plain torch, operation by operation as transformers' modules have them.

But for attention, which is float32 throughout, and reads nothing that its mask excludes.
"""

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


def attended(
    q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    k_BGLD, v_BGLD = k_BGLD.float(), v_BGLD.float()
    q_BGSD = q_BHTD.float().reshape(*k_BGLD.shape[:2], -1, q_BHTD.shape[-1])
    s_BGSL = q_BGSD @ k_BGLD.mT * scale
    if mask is not None:
        left = mask if mask.dtype == torch.bool else mask != -torch.inf
        v_BGLD = v_BGLD.where(left.mT, 0.0)
        s_BGSL = s_BGSL if mask.dtype == torch.bool else s_BGSL + mask.float()
        s_BGSL = s_BGSL.where(left, -torch.inf)
    top_BGS1 = s_BGSL.amax(-1, keepdim=True)
    p_BGSL = (s_BGSL - top_BGS1.where(top_BGS1 > -torch.inf, 0.0)).exp()
    total_BGS1 = p_BGSL.sum(-1, keepdim=True)
    out_BGSD = p_BGSL @ v_BGLD / total_BGS1.where(total_BGS1 > 0, 1.0)
    return out_BGSD.flatten(1, 2)[:, None].to(q_BHTD.dtype)
