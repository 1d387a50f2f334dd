"""Activations to codes: a program owns a row, reads it once and keeps it in registers.

Rows too wide for that are read twice. Where rows are few, several programs share one: each finds
the extremes of all of it, and rounds its span, for a multiprocessor takes longer to round than to
read. One scale for all rows takes a pass before, whose programs leave the extremes of what they
saw; every program of the second pass compares those. Extremes don't hang on the order of comparing,
so no result hangs on tiles or warps.

Extremes are compared as whole numbers: the bits of floats, turned so that they have the order of
the values, with a NaN beyond the infinities. So one NaN is enough to be found.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.dependent import later_than_few, release, wait
from quantkernels.devices import capability
from quantkernels.forward.fused import norm_warps, normed, rms_norm
from quantkernels.nearest import quotient, to_float8, to_float8_ptx, to_int8_ptx, to_whole
from quantkernels.rounding import reference
from quantkernels.rounding.operators import as_rounded, kept, outputs
from quantkernels.rounding.reference import InputGrid

HELD = 32_768  # values of a row that a program keeps for its norm, at most
KEPT = 4096  # without one: a wider row is read twice, the second time from the cache
READ = 4096  # of that at a time
SEEN = 8192  # in the pass before
PARTS = 1024  # programs of the pass before, at most
PROGRAMS, MOST_SPANS, LEAST_SPAN = 128, 8, 512  # where rows are few, and several share one

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Norm:
    weight_I: Tensor
    eps: float
    form: str
    kept_TI: Tensor | None


def by_token(x_TI: Tensor, grid: InputGrid) -> Three:
    if not x_TI.numel():
        return reference.by_token(x_TI, grid)
    found = outputs(x_TI, (*x_TI.shape[:-1], 1))
    _round(x_TI, grid, found)
    return found


def rounded_by_token(x_TI: Tensor, grid: InputGrid) -> Tensor:
    assert grid.name == "affine"
    if not x_TI.numel():
        return reference.rounded_by_token(x_TI, grid)
    found_TI = as_rounded(x_TI)
    _round(x_TI, grid, (found_TI, None, None))
    return found_TI


def by_tensor(x_TI: Tensor, grid: InputGrid) -> Three:
    if not x_TI.numel():
        return reference.by_tensor(x_TI, grid)
    found = outputs(x_TI, ())
    alone = x_TI.numel() == x_TI.shape[-1]
    _round(x_TI, grid, found, parts_2P=None if alone else _extremes_of_parts(x_TI, grid))
    return found


def by_scale(x_TI: Tensor, scale: Tensor, grid: InputGrid) -> Three:
    assert scale.numel() == 1 and grid.symmetric
    if not x_TI.numel():
        return reference.by_scale(x_TI, scale, grid)
    found = outputs(x_TI, ())
    _round(x_TI, grid, found, given=scale)
    return found


def norm(
    x_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    form: str,
    scale: Tensor | None,
    keep: bool,
    grid: InputGrid,
) -> Four:
    assert len(weight_I) == x_TI.shape[-1]
    kept_TI = kept(x_TI, keep)
    if len(weight_I) > HELD or not x_TI.numel():
        normed_TI = rms_norm(x_TI, weight_I, eps, form)
        found = by_token(normed_TI, grid) if scale is None else by_scale(normed_TI, scale, grid)
        return *found, normed_TI if keep else kept_TI
    found = outputs(x_TI, (*x_TI.shape[:-1], 1) if scale is None else ())
    before = _Norm(weight_I, eps, form, kept_TI if keep else None)
    _round(x_TI, grid, found, given=scale, norm=before)
    return *found, kept_TI


def _round(
    x_TI: Tensor,
    grid: InputGrid,
    found: Three | tuple[Tensor, None, None],
    *,
    given: Tensor | None = None,
    parts_2P: Tensor | None = None,
    norm: _Norm | None = None,
) -> None:
    rows_TI = _rows(x_TI)
    rows, width = rows_TI.shape
    parts = 0 if parts_2P is None else parts_2P.shape[1]
    size = sizes(rows, width, norm=norm is not None)
    _round_row[rows, size.spans](
        rows_TI,
        None if norm is None else norm.weight_I,
        None if norm is None else norm.kept_TI,
        given,
        parts_2P,
        *found,
        width,
        0.0 if norm is None else norm.eps,
        parts,
        *rows_TI.stride(),
        0 if norm is None else norm.weight_I.stride(0),
        grid.name,
        grid.qmin,
        grid.qmax,
        grid.symmetric,
        "none" if norm is None else norm.form,
        given is None and parts_2P is None,
        size.held,
        size.block,
        size.spans,
        size.piece,
        triton.next_power_of_2(parts),
        x_TI.is_cuda,
        _by_instruction(x_TI.device, grid, size),
        **later_than_few(x_TI.device, rows, size.spans),
        num_warps=size.warps,
        enable_fp_fusion=False,
    )


def _by_instruction(device: torch.device, grid: InputGrid, size: "Sizes") -> bool:
    """Whether the GPU has one that rounds to the grid, and each thread the four values it takes."""
    ends = {"affine": (-128, 127), "float8": (-448, 448)}[grid.name]
    known = device.type == "cuda" and (grid.name == "affine" or capability(device) >= (8, 9))
    return known and (grid.qmin, grid.qmax) == ends and size.piece >= 4 * 32 * size.warps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    held: bool  # whether a program keeps all of its row
    block: int  # values that are read at once
    spans: int  # of a row, a program each
    piece: int  # values that are rounded at once
    warps: int


def sizes(rows: int, width: int, *, norm: bool) -> Sizes:
    block, spans = triton.next_power_of_2(width), 1
    while (
        not norm
        and spans < MOST_SPANS
        and 2 * spans * rows <= PROGRAMS
        and block > spans * LEAST_SPAN
    ):
        spans *= 2
    held = block <= (HELD if norm or spans > 1 else KEPT)
    return Sizes(
        held=held,
        block=block if held else READ,
        spans=spans,
        piece=block // spans if held else min(READ, block // spans),
        warps=norm_warps(block) if norm or spans > 1 else max(1, min(8, block // 512)),
    )


def _extremes_of_parts(x_TI: Tensor, grid: InputGrid) -> Tensor:
    """Whole numbers: of each part the largest, or the largest magnitude; and the least."""
    rows_TI = _rows(x_TI)
    rows, width = rows_TI.shape
    block = min(triton.next_power_of_2(width), SEEN)
    parts = min(rows * triton.cdiv(width, block), PARTS)
    parts_2P = torch.empty(2, parts, dtype=torch.int32, device=x_TI.device)
    _extremes_of_part[(parts,)](
        rows_TI,
        parts_2P,
        rows,
        width,
        *rows_TI.stride(),
        grid.symmetric,
        block,
        num_warps=norm_warps(block),
    )
    return parts_2P


def _rows(x_TI: Tensor) -> Tensor:
    rows_TI = x_TI.reshape(-1, x_TI.shape[-1])
    # within a row, kernels count in 32 bits
    far = rows_TI.stride(1) * rows_TI.shape[1] >= 1 << 31
    return rows_TI.contiguous() if far else rows_TI


@triton.jit
def _round_row(
    x_ptr,
    weight_ptr,
    kept_ptr,
    given_ptr,
    parts_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    width,
    eps,
    parts,
    stride_T,
    stride_I,
    stride_weight,
    GRID: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORM: tl.constexpr,
    OWN: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    PIECE: tl.constexpr,
    PARTS: tl.constexpr,
    FUSED: tl.constexpr,
    PTX: tl.constexpr,
    LATER: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(LATER)
    release(EARLY)
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * stride_T
    codes_ptr += row * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    if HELD:
        stored = tl.load(x_ptr + column * stride_I, mask=inside, other=0.0)
        if NORM != "none":
            weight = tl.load(weight_ptr + column * stride_weight, mask=inside, other=0.0)
            stored = normed(stored, weight.to(tl.float32), width, eps, NORM == "offset")
            if kept_ptr is not None:
                tl.store(kept_ptr + row * width + column, stored, mask=inside)
        x = stored.to(tl.float32)

    if given_ptr is not None:
        scale = tl.load(given_ptr).to(tl.float32)
        zero = tl.zeros_like(scale)
    else:
        if parts_ptr is not None:
            high, low = _extremes_of_all(parts_ptr, parts, PARTS)
        elif HELD:
            high, low = _extremes(x, SYMMETRIC)
        else:
            high, low = _extremes_of_row(x_ptr, width, stride_I, SYMMETRIC, BLOCK)
        scale, zero = _range(high, low, QMIN, QMAX, SYMMETRIC)
    bounded: tl.constexpr = given_ptr is None
    span = tl.program_id(1)
    if scale_ptr is not None:  # else codes are read back
        first = (span == 0) & ((row == 0) | OWN)  # one program writes down what is that of all
        tl.store(scale_ptr + row * OWN, scale, mask=first)
        tl.store(zero_ptr + row * OWN, zero, mask=first)

    if HELD and SPANS == 1:
        code = _code(x, scale, zero, GRID, QMIN, QMAX, SYMMETRIC, FUSED, bounded, PTX)
        if scale_ptr is None:
            code = (code.to(tl.float32) - zero) * scale
        tl.store(codes_ptr + column, code, mask=inside)
    else:
        for start in range(span * PIECE, width, SPANS * PIECE):
            part = start + tl.arange(0, PIECE)  # of another size than above: other names
            again = tl.load(x_ptr + part * stride_I, mask=part < width, other=0.0)
            rounded = _code(
                again.to(tl.float32), scale, zero, GRID, QMIN, QMAX, SYMMETRIC, FUSED, bounded, PTX
            )
            if scale_ptr is None:
                rounded = (rounded.to(tl.float32) - zero) * scale
            tl.store(codes_ptr + part, rounded, mask=part < width)


@triton.jit
def _extremes_of_part(
    x_ptr,
    parts_ptr,
    rows,
    width,
    stride_T,
    stride_I,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_row = tl.cdiv(width, BLOCK)
    high, low = tl.zeros((), dtype=tl.int32), tl.zeros((), dtype=tl.int32)
    for piece in range(tl.program_id(0), rows * per_row, tl.num_programs(0)):
        row = tl.cast(piece // per_row, tl.int64)
        column = piece % per_row * BLOCK + tl.arange(0, BLOCK)
        at = x_ptr + row * stride_T + column * stride_I
        x = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
        more_high, more_low = _extremes(x, SYMMETRIC)
        high, low = tl.maximum(high, more_high), tl.minimum(low, more_low)
    tl.store(parts_ptr + tl.program_id(0), high)
    tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), low)


@triton.jit
def _extremes_of_all(parts_ptr, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    high = tl.load(parts_ptr + part, mask=part < parts, other=0)
    low = tl.load(parts_ptr + parts + part, mask=part < parts, other=0)
    return tl.max(high, axis=0), tl.min(low, axis=0)


@triton.jit
def _extremes_of_row(x_ptr, width, stride_I, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    high, low = tl.zeros((), dtype=tl.int32), tl.zeros((), dtype=tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column * stride_I, mask=column < width, other=0.0)
        more_high, more_low = _extremes(x.to(tl.float32), SYMMETRIC)
        high, low = tl.maximum(high, more_high), tl.minimum(low, more_low)
    return high, low


@triton.jit
def _extremes(x, SYMMETRIC: tl.constexpr):
    """The largest and the least value, 0 among them; or the largest magnitude, and 0."""
    bits = x.to(tl.int32, bitcast=True)
    if SYMMETRIC:
        high = tl.max(bits & 0x7FFFFFFF, axis=0)
        low = tl.zeros_like(high)
    else:
        ordered = _turned(bits)
        high = tl.maximum(tl.max(ordered, axis=0), 0)
        low = tl.minimum(tl.min(ordered, axis=0), 0)
    return high, low


@triton.jit
def _turned(bits):
    """From the bits of floats to whole numbers of their order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _range(high, low, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    high = _turned(high).to(tl.float32, bitcast=True)
    low = _turned(low).to(tl.float32, bitcast=True)
    span = high if SYMMETRIC else high - low
    steps: tl.constexpr = (QMAX - QMIN) / 2 if SYMMETRIC else QMAX - QMIN
    scale = tl.math.div_rn(span, tl.zeros_like(span) + steps)
    scale = tl.where(scale == 0, 1.0, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        near = to_whole(QMIN - tl.math.div_rn(low, scale))
        zero = tl.where(near == near, tl.minimum(tl.maximum(near, QMIN), QMAX), near)
    return scale, zero


@triton.jit
def _code(
    x,
    scale,
    zero,
    GRID: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FUSED: tl.constexpr,
    BOUNDED: tl.constexpr,
    PTX: tl.constexpr,
):
    steps = quotient(x, scale, FUSED, BOUNDED)
    if PTX and GRID == "float8":
        code = to_float8_ptx(steps)
    elif PTX:
        code = to_int8_ptx(steps if SYMMETRIC else to_whole(steps) + zero)
    elif GRID == "float8":
        code, _ = to_float8(steps, QMIN, QMAX)
        code = tl.where(steps == steps, code, 0x7F)
    else:
        tl.static_assert(GRID == "affine", "this grid is not known here")
        near = to_whole(steps) + zero
        code = tl.where(near == near, tl.minimum(tl.maximum(near, QMIN), QMAX), 0.0)
    return code.to(tl.int8)
