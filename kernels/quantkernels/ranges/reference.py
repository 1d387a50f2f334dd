"""Affine ranges of groups of weights, in plain torch.

A weight w is stored as a code q in qmin..qmax. Without a zero point it is read back as q * scale,
and max|w| is spread over qmax - qmin steps. With a whole one it is (q - zero) * scale, and the
group's extremes are spread, 0 among them. With a float one it is q * scale + zero, and the extremes
are spread as they are. What is stored, scale and float zero, is rounded to its dtype before any
weight is.

Shape suffixes: O = rows of the weight, G = groups per row, I = weights of a group, S = factors.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkernels.grids import ROUND, GridName


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineRange:
    qmin: int
    qmax: int
    zero_point: Literal["none", "int", "float"]
    stored: torch.dtype  # of the scale, and of a float zero point


def extremes(
    w_OGI: Tensor, kind: AffineRange, shrink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int8; a float one: float32), both (O, G).

    The extremes are scaled by `shrink` first: towards 0, or, with a float zero point, towards
    their middle.
    """
    low_OG, high_OG = w_OGI.amin(-1), w_OGI.amax(-1)
    if kind.zero_point == "float":
        return _offset_range(low_OG, high_OG, kind, shrink)
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    if shrink is not None:
        low_OG, high_OG = low_OG * shrink, high_OG * shrink
    symmetric = kind.zero_point == "none"
    span_OG = 2 * torch.maximum(-low_OG, high_OG) if symmetric else high_OG - low_OG
    scale_OG = _storable(span_OG / (kind.qmax - kind.qmin), kind.stored)
    if symmetric:
        return scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8)
    zero_OG = (kind.qmin - low_OG / scale_OG).round().clamp(kind.qmin, kind.qmax)
    return scale_OG, zero_OG.to(torch.int8)


def _offset_range(
    low_OG: Tensor, high_OG: Tensor, kind: AffineRange, shrink: Tensor | None
) -> tuple[Tensor, Tensor]:
    if shrink is not None:
        cut_OG = (high_OG - low_OG) * (0.5 - 0.5 * shrink)
        low_OG, high_OG = low_OG + cut_OG, high_OG - cut_OG
    scale_OG = ((high_OG - low_OG) / (kind.qmax - kind.qmin)).to(kind.stored).float()
    # where all weights are one value, it is code 0's, whatever a step is
    zero_OG = torch.where(scale_OG > 0, low_OG - kind.qmin * scale_OG, low_OG)
    return torch.where(scale_OG > 0, scale_OG, 1.0), zero_OG.to(kind.stored).float()


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
    grid: GridName = "offset" if kind.zero_point == "float" else "affine"
    scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None].float()
    rounded = ROUND[grid](w_OGI, scale_OG1, zero_OG1, (kind.qmin, kind.qmax))
    return ((w_OGI - rounded.values).square() * importance_GI).sum(-1)
