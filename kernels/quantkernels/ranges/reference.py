"""Affine ranges of groups of weights, in plain torch.

A weight w is stored as a code q in qmin..qmax and read back as (q - zero) * scale. A symmetric
grid spreads max|w| over qmax - qmin steps; the other kind spreads the group's extremes, zero
among them. The scale is rounded to the dtype it is stored in before any weight is.

Shape suffixes: O = rows of the weight, G = groups per row, I = weights of a group, S = factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineRange:
    qmin: int
    qmax: int
    symmetric: bool
    stored: torch.dtype  # of the scale


def extremes(
    w_OGI: Tensor, kind: AffineRange, shrink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int8), both (O, G), of the extremes times `shrink`."""
    low_OG = w_OGI.amin(-1).clamp(max=0)
    high_OG = w_OGI.amax(-1).clamp(min=0)
    if shrink is not None:
        low_OG, high_OG = low_OG * shrink, high_OG * shrink
    span_OG = 2 * torch.maximum(-low_OG, high_OG) if kind.symmetric else high_OG - low_OG
    scale_OG = _storable(span_OG / (kind.qmax - kind.qmin), kind.stored)
    if kind.symmetric:
        return scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8)
    zero_OG = (kind.qmin - low_OG / scale_OG).round().clamp(kind.qmin, kind.qmax)
    return scale_OG, zero_OG.to(torch.int8)


def search(
    w_OGI: Tensor, importance_GI: Tensor, kind: AffineRange, shrink_S: Tensor
) -> tuple[Tensor, Tensor]:
    w_OGI = w_OGI.float()
    scale_OG, zero_OG = extremes(w_OGI, kind)
    least_OG = _error(w_OGI, importance_GI, kind, scale_OG, zero_OG)
    for shrink in shrink_S[1:]:
        tried_OG, zero_too_OG = extremes(w_OGI, kind, shrink)
        error_OG = _error(w_OGI, importance_GI, kind, tried_OG, zero_too_OG)
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        scale_OG = torch.where(better_OG, tried_OG, scale_OG)
        zero_OG = torch.where(better_OG, zero_too_OG, zero_OG)
    return scale_OG, zero_OG


def _storable(scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    """Round to the stored dtype; a group of zeros, or one that rounds to nothing, gets 1."""
    rounded_OG = scale_OG.to(stored).float()
    return torch.where(rounded_OG > 0, rounded_OG, torch.ones_like(rounded_OG))


def _error(
    w_OGI: Tensor, importance_GI: Tensor, kind: AffineRange, scale_OG: Tensor, zero_OG: Tensor
) -> Tensor:
    scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None].float()
    code_OGI = ((w_OGI / scale_OG1).round() + zero_OG1).clamp(kind.qmin, kind.qmax)
    value_OGI = (code_OGI - zero_OG1) * scale_OG1
    return ((w_OGI - value_OGI).square() * importance_GI).sum(-1)
