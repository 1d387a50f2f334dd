"""Affine integer quantization: w is stored as a code q and read back as (q - z) * s.

Codes are signed, from -2**(bits-1) to 2**(bits-1)-1, with or without a zero point, as the
compressed-tensors format has them. A symmetric grid spreads max|w| over 2**bits - 1 steps, so
that it uses its one extra negative code (the convention of compressed-tensors and llm-compressor).

Shape suffixes: O = out_features, I = in_features, G = groups per row.
Float32 maths on w's own device.
"""

from dataclasses import dataclass

import torch
from quantkernels.ranges import AffineRange, extremes, search
from torch import Tensor

from quantcore.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Qparams:
    """Scale and zero point of every group of a weight."""

    scale_OG: Tensor  # float32, holding values that the stored dtype represents exactly
    zero_OG: Tensor  # int8; all zero when the scheme is symmetric


def code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def choose_qparams(
    w_OI: Tensor, scheme: Scheme, *, stored: torch.dtype, shrink: Tensor | None = None
) -> Qparams:
    """Scale and zero point from each group's extremes, the scale rounded to the `stored` dtype.

    `shrink` (O, G), float32 in (0, 1], scales the extremes first: a clipped range rounds the
    other weights finer. The scale is rounded before any weight is, so that a solve and a replay
    from the artifact see the same grid.
    """
    groups_OGI = _grouped(w_OI.float(), scheme)
    return Qparams(*extremes(groups_OGI, _range(scheme, stored), shrink))


def search_qparams(
    w_OI: Tensor, importance_I: Tensor, scheme: Scheme, *, stored: torch.dtype
) -> Qparams:
    """The shrunk range that makes sum(importance * (w - q)**2) least, group by group.

    `importance_I` is the mean square of each input: the diagonal of the Hessian, so the search
    minimizes the part of the output error that one group causes on its own. Shrink factors run
    from 1.00 down to 0.60 in steps of 0.02.
    """
    importance_GI = _grouped(importance_I.float()[None], scheme)[0]
    # in float64 and on the device itself: 1 - 0.02 n rounds once, and nothing is copied there
    steps_S = torch.arange(21, dtype=torch.float64, device=w_OI.device)
    shrink_S = (1.0 - 0.02 * steps_S).float()
    return Qparams(*search(_grouped(w_OI, scheme), importance_GI, _range(scheme, stored), shrink_S))


def quantize(w_OI: Tensor, qparams: Qparams, scheme: Scheme) -> Tensor:
    """The nearest code of every weight, int8 (O, I)."""
    qmin, qmax = code_range(scheme.bits)
    groups_OGI = _grouped(w_OI.float(), scheme)
    codes_OGI = (groups_OGI / qparams.scale_OG[..., None]).round() + qparams.zero_OG[..., None]
    return codes_OGI.clamp(qmin, qmax).to(torch.int8).reshape(w_OI.shape)


def dequantize(codes_OI: Tensor, qparams: Qparams, scheme: Scheme) -> Tensor:
    """The weights that codes stand for, float32 (O, I)."""
    codes_OGI = _grouped(codes_OI, scheme).float()
    values_OGI = (codes_OGI - qparams.zero_OG[..., None].float()) * qparams.scale_OG[..., None]
    return values_OGI.reshape(codes_OI.shape)


def _grouped(w_OI: Tensor, scheme: Scheme) -> Tensor:
    rows, width = w_OI.shape
    return w_OI.reshape(rows, scheme.groups_of(width), -1)


def _range(scheme: Scheme, stored: torch.dtype) -> AffineRange:
    qmin, qmax = code_range(scheme.bits)
    return AffineRange(qmin=qmin, qmax=qmax, symmetric=scheme.symmetric, stored=stored)
