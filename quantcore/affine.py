"""Weights onto a scheme's grid and back: a code q, a scale s and what zero is.

    no zero point      w = q * s          integer and float8 codes
    integer            w = (q - z) * s    z is itself a code
    float              w = q * s + z      z is stored as the scale is

Integer codes are signed, from -2**(bits-1) to 2**(bits-1)-1, with or without a zero point, as the
compressed-tensors format has them. A symmetric grid spreads max|w| over 2**bits - 1 steps, so
that it uses its one extra negative code (the convention of compressed-tensors and llm-compressor).
A float8 grid carries max|w| to its largest value. Codes travel as int8; of float8, as its bits.

Shape suffixes: O = out_features, I = in_features, G = groups per row.
Float32 maths on w's own device.
"""

from dataclasses import dataclass

import torch
from quantkernels.grids import GridName, nearest, values
from quantkernels.ranges import AffineRange, extremes, search
from torch import Tensor

from quantcore.schemes import FloatGrid, Scheme


@dataclass(frozen=True, slots=True)
class Qparams:
    """Scale and zero point of every group of a weight."""

    scale_OG: Tensor  # float32, holding values that the stored dtype represents exactly
    zero_OG: Tensor  # int8, all zero where there is none; a float zero point: float32


def grid_name(scheme: Scheme) -> GridName:
    """What the kernels call a scheme's way from codes to values."""
    if isinstance(scheme.grid, FloatGrid):
        assert scheme.grid.dtype == torch.float8_e4m3fn and scheme.zero_point == "none"
        return "float8"
    return "offset" if scheme.zero_point == "float" else "affine"


def choose_qparams(
    w_OI: Tensor,
    scheme: Scheme,
    *,
    stored: torch.dtype,
    shrink: Tensor | None = None,
    largest: Tensor | None = None,
) -> Qparams:
    """Scale and zero point from each group's extremes, both rounded to the `stored` dtype.

    `shrink` (O, G), float32 in (0, 1], scales the extremes first: a clipped range rounds the
    other weights finer. The scale is rounded before any weight is, so that a solve and a replay
    from the artifact see the same grid. `largest` (scalar) is max|w| of the whole tensor for a
    scheme with one scale, where `w_OI` is but some of its rows. Such a scale stands in every row.
    """
    kind = _range(scheme, stored)
    if not scheme.per_tensor:
        return Qparams(*extremes(_grouped(w_OI.float(), scheme), kind, shrink))
    whole = w_OI.abs().amax() if largest is None else largest
    scale, zero = extremes(whole.float().reshape(1, 1, 1), kind, shrink)
    return Qparams(*(one.expand(len(w_OI), 1).contiguous() for one in (scale, zero)))


def search_qparams(
    w_OI: Tensor, importance_I: Tensor, scheme: Scheme, *, stored: torch.dtype
) -> Qparams:
    """The shrunk range that makes sum(importance * (w - q)**2) least, group by group.

    `importance_I` is what a squared error counts for in each input's column: for GPTQ what is left
    of it once later columns have absorbed what they can (`gptq.Factor.column_costs`). Shrink
    factors run from 1.00 down to 0.60 in steps of 0.02. For integer grids within a row: the steps
    of a float grid shrink with its values, so that clipping the largest makes no other finer.
    """
    importance_GI = _grouped(importance_I.float()[None], scheme)[0]
    # in float64 and on the device itself: 1 - 0.02 n rounds once, and nothing is copied there
    steps_S = torch.arange(21, dtype=torch.float64, device=w_OI.device)
    shrink_S = (1.0 - 0.02 * steps_S).float()
    return Qparams(*search(_grouped(w_OI, scheme), importance_GI, _range(scheme, stored), shrink_S))


def quantize(w_OI: Tensor, qparams: Qparams, scheme: Scheme) -> Tensor:
    """The nearest code of every weight, int8 (O, I)."""
    low, high = scheme.grid.lowest, scheme.grid.highest
    scale_OG1, zero_OG1 = qparams.scale_OG[..., None], qparams.zero_OG[..., None]
    groups_OGI = _grouped(w_OI.float(), scheme)
    codes_OGI = nearest(grid_name(scheme), groups_OGI, scale_OG1, zero_OG1, (low, high))
    return codes_OGI.reshape(w_OI.shape)


def dequantize(codes_OI: Tensor, qparams: Qparams, scheme: Scheme) -> Tensor:
    """The weights that codes stand for, float32 (O, I)."""
    scale_OG1, zero_OG1 = qparams.scale_OG[..., None], qparams.zero_OG[..., None]
    codes_OGI = _grouped(codes_OI, scheme)
    return values(grid_name(scheme), codes_OGI, scale_OG1, zero_OG1).reshape(codes_OI.shape)


def _grouped(w_OI: Tensor, scheme: Scheme) -> Tensor:
    rows, width = w_OI.shape
    groups = scheme.groups_of(width)
    return w_OI.reshape(rows, groups, width // groups)  # a slice may have no rows


def _range(scheme: Scheme, stored: torch.dtype) -> AffineRange:
    grid = scheme.grid
    return AffineRange(
        qmin=grid.lowest, qmax=grid.highest, zero_point=scheme.zero_point, stored=stored
    )
