"""The range search as one kernel: a group's weights are read once and tried with every factor.

Shape suffixes: O = rows of the weight, G = groups per row, I = weights of a group, S = factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.bits import RANGE_CHUNK
from quantkernels.devices import on_its_device
from quantkernels.nearest import to_whole
from quantkernels.ranges.reference import AffineRange

WEIGHTS = 2048  # that one program holds at a time
STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@on_its_device
def search(
    w_OGI: Tensor, importance_GI: Tensor, kind: AffineRange, shrink_S: Tensor
) -> tuple[Tensor, Tensor]:
    rows, groups, size = w_OGI.shape
    scale_OG = torch.empty(rows, groups, device=w_OGI.device)
    zero_dtype = torch.float32 if kind.zero_point == "float" else torch.int8
    zero_OG = torch.empty(rows, groups, dtype=zero_dtype, device=w_OGI.device)
    importance_GI = importance_GI.contiguous()
    chunk = min(triton.next_power_of_2(size), RANGE_CHUNK)
    together = max(WEIGHTS // chunk, 1)
    _search[(groups * triton.cdiv(rows, together),)](
        w_OGI,
        importance_GI,
        shrink_S,
        scale_OG,
        zero_OG,
        rows,
        groups,
        size,
        len(shrink_S),
        *w_OGI.stride(),
        kind.qmin,
        kind.qmax,
        kind.zero_point,
        STORED[kind.stored],
        together,
        chunk,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return scale_OG, zero_OG


@triton.jit(do_not_specialize=["rows", "groups", "factors", "qmin", "qmax"])
def _search(
    w_ptr,
    importance_ptr,
    shrink_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    groups,
    size,
    factors,
    stride_O,
    stride_G,
    stride_I,
    qmin,
    qmax,
    ZERO: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    g = tl.program_id(0) % groups
    o = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, CHUNK)
    w_ptr += tl.cast(g, tl.int64) * stride_G
    line_ptr = w_ptr + tl.cast(o, tl.int64)[:, None] * stride_O + i[None, :] * stride_I
    importance_ptr += g * size + i
    low = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    high = -low
    for first in range(0, size, CHUNK):
        inside = (o < rows)[:, None] & (first + i < size)[None, :]
        w = tl.load(line_ptr + first * stride_I, mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(inside, w, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(inside, w, float("-inf")), axis=1))
    low, high = tl.where(o < rows, low, 0.0), tl.where(o < rows, high, 0.0)
    if ZERO != "float":
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    least = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    best_scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    best_zero = tl.zeros((ROWS,), dtype=tl.float32)
    for step in range(factors):
        shrink = tl.load(shrink_ptr + step)
        if ZERO == "float":
            cut = (high - low) * (0.5 - 0.5 * shrink)
            scale, zero = _offset_range(low + cut, high - cut, qmin, qmax, STORED)
        else:
            scale, zero = _range(low * shrink, high * shrink, qmin, qmax, ZERO == "none", STORED)
        # not infinite where a scale is subnormal
        per_step = tl.minimum(tl.math.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale), 3.4e38)
        error = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, size, CHUNK):
            inside = (o < rows)[:, None] & (first + i < size)[None, :]
            w = tl.load(line_ptr + first * stride_I, mask=inside, other=0.0).to(tl.float32)
            importance = tl.load(importance_ptr + first, mask=first + i < size, other=0.0)
            if ZERO == "float":
                steps = to_whole((w - zero[:, None]) * per_step[:, None])
                code = tl.minimum(tl.maximum(steps, qmin), qmax)
                off = w - (code * scale[:, None] + zero[:, None])
            else:
                steps = to_whole(w * per_step[:, None]) + zero[:, None]
                code = tl.minimum(tl.maximum(steps, qmin), qmax)
                off = w - (code - zero[:, None]) * scale[:, None]
            error += tl.sum(off * off * importance[None, :], axis=1)
        better = error < least
        if step == 0:  # kept even where every error is NaN or infinite
            better = tl.full((ROWS,), 1, dtype=tl.int1)
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    at = tl.cast(o, tl.int64) * groups + g
    tl.store(scale_ptr + at, best_scale, mask=o < rows)
    tl.store(zero_ptr + at, best_zero.to(zero_ptr.dtype.element_ty), mask=o < rows)


@triton.jit
def _range(low, high, qmin, qmax, SYMMETRIC: tl.constexpr, STORED: tl.constexpr):
    span = 2.0 * tl.maximum(-low, high) if SYMMETRIC else high - low
    scale = tl.math.div_rn(span, tl.zeros_like(span) + (qmax - qmin))
    scale = scale.to(STORED).to(tl.float32)
    scale = tl.where(scale > 0, scale, 1.0)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = tl.minimum(tl.maximum(to_whole(qmin - tl.math.div_rn(low, scale)), qmin), qmax)
    return scale, zero


@triton.jit
def _offset_range(low, high, qmin, qmax, STORED: tl.constexpr):
    scale = tl.math.div_rn(high - low, tl.zeros_like(low) + (qmax - qmin))
    scale = scale.to(STORED).to(tl.float32)
    zero = tl.where(scale > 0, low - qmin * scale, low).to(STORED).to(tl.float32)
    return tl.where(scale > 0, scale, 1.0), zero
