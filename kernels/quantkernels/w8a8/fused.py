"""Products of 8-bit inputs in Triton: whole codes summed in int32, float8 in float32.

A program owns some rows of the weight, some tokens and a span of the columns; the weight's tile is
the left operand. 4-bit codes are made bytes in registers, sixteen times too large, which is one or
two operations for four of them. Spans are added up as in `weight_only`: by the last program of a
tile, in their order.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.launches import Launch
from quantkernels.w8a8 import tiles
from quantkernels.w8a8.tiles import Tiles8
from quantkernels.weight_only.arrivals import arrivals
from quantkernels.weight_only.tiles import program_rows

BLOCK = tl.constexpr(tiles.ROWS)
COLUMNS = tl.constexpr(tiles.COLUMNS)


def linear(
    codes_TI: Tensor,
    scale_T: Tensor,
    zero_T: Tensor | None,
    weight: Tiles8,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    launch: Launch,
    *,
    compile_only: bool = False,
) -> Tensor:
    tokens, columns = codes_TI.shape
    rows = weight.features[0]
    device = codes_TI.device
    out_TO = torch.empty(tokens, rows, dtype=dtype, device=device)
    height = program_rows(rows, launch.rows) if weight.tiled else launch.rows
    count = triton.cdiv(rows, height) * triton.cdiv(tokens, launch.tokens)
    pieces = triton.cdiv(columns, tiles.COLUMNS)
    split = min(launch.split, pieces)
    whole = weight.kind != "float8" and weight.group == 0
    parts = counters = out_TO
    if split > 1:
        kept = torch.int32 if whole else torch.float32
        parts = torch.empty(split, count, height, launch.tokens, dtype=kept, device=device)
        counters = arrivals(device, count)
    grid = (count * split,)
    run = partial(_linear.warmup, grid=grid) if compile_only else _linear[grid]
    ptx = device.type in ("cuda", "meta") and torch.version.hip is None
    run(
        codes_TI,
        scale_T,
        scale_T if zero_T is None else zero_T,
        weight.codes,
        weight.scale,
        weight.scale if weight.sums_O is None else weight.sums_O,
        scale_T if bias_O is None else bias_O,
        out_TO,
        parts,
        counters,
        tokens,
        rows,
        columns,
        pieces,
        codes_TI.stride(0),
        codes_TI.stride(1),
        weight.codes.stride(0),
        weight.tiled,
        scale_T.numel() > 1,
        zero_T is not None,
        bias_O is not None,
        columns % tiles.COLUMNS == 0,
        weight.kind == "int4",
        weight.group,
        ptx,
        height,
        launch.tokens,
        split,
        launch.stages,
        num_warps=launch.warps,
    )
    return out_TO


@triton.jit
def _linear(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    codes_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    tokens,
    rows,
    columns,
    pieces,
    x_T,
    x_I,
    codes_O,
    TILED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BYTES: tl.constexpr = COLUMNS // 2 if INT4 else COLUMNS  # of a row of a tile
    STEP: tl.constexpr = BYTES if GROUP == 0 or GROUP > BYTES else GROUP  # columns of a product
    GROUPS: tl.constexpr = COLUMNS // GROUP if GROUP > 0 else 0
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    NONE: tl.constexpr = 0 if WHOLE else 0.0
    SUMS: tl.constexpr = tl.int32 if WHOLE and GROUP == 0 else tl.float32

    own = tl.program_id(0)
    count = tl.num_programs(0) // SPLIT
    tile, span = own // SPLIT, own % SPLIT
    first, last = pieces * span // SPLIT, pieces * (span + 1) // SPLIT
    across = tl.cdiv(tokens, TOKENS)
    top = tile // across * ROWS
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[None, :]
    byte = tl.arange(0, STEP)
    inside = top % BLOCK + tl.arange(0, ROWS)  # of this block of rows, or of the next
    start = tl.cast(top // BLOCK, tl.int64) * pieces + first
    block = inside // BLOCK * pieces
    row = top + tl.arange(0, ROWS)
    if TILED:
        codes_ptr += start * (BLOCK * BYTES)
        codes_ptr += (block * (BLOCK * BYTES) + inside % BLOCK * BYTES)[:, None] + byte[None, :]
        onward = BLOCK * BYTES
    else:  # rows past the end are read as the last one, and not kept
        some = tl.cast(tl.minimum(row, rows - 1), tl.int64)
        codes_ptr += some[:, None] * codes_O + (first * COLUMNS + byte)[None, :]
        onward = COLUMNS
    wide = tl.cdiv(pieces, 2) * 2  # pieces to a row's scales, which are padded further than codes
    group_ptr = scale_ptr + (tl.cast(top // BLOCK, tl.int64) * wide + first) * (GROUPS * BLOCK)
    group_ptr += inside // BLOCK * wide * (GROUPS * BLOCK) + inside % BLOCK
    x_ptr += tl.cast(token, tl.int64)[None, :] * x_T + (first * COLUMNS + byte[:, None]) * x_I
    sums = tl.zeros((ROWS, TOKENS), SUMS)
    for piece in tl.range(first, last, num_stages=STAGES):
        for step in tl.static_range(BYTES // STEP):
            if TILED or EVEN:
                stored = tl.load(codes_ptr + step * STEP)
            else:
                left = columns - piece * COLUMNS - step * STEP
                stored = tl.load(codes_ptr + step * STEP, mask=(byte < left)[None, :], other=NONE)
            for half in tl.static_range(2 if INT4 else 1):
                at = x_ptr + (half * BYTES + step * STEP) * x_I
                if EVEN:
                    x = tl.load(at, mask=here, other=NONE)
                else:
                    left = columns - piece * COLUMNS - half * BYTES - step * STEP
                    x = tl.load(at, mask=here & (byte < left)[:, None], other=NONE)
                values = _bytes(stored, half, PTX) if INT4 else stored
                if GROUP == 0 and WHOLE:
                    sums = tl.dot(values, x, sums, out_dtype=tl.int32)
                elif GROUP == 0:
                    sums += tl.dot(values, x)  # 128 columns: units sum float8 in fewer bits
                else:
                    if (half * BYTES + step * STEP) % GROUP == 0:
                        of_group = tl.zeros((ROWS, TOKENS), tl.int32)
                    of_group = tl.dot(values, x, of_group, out_dtype=tl.int32)
                    if (half * BYTES + step * STEP + STEP) % GROUP == 0:
                        scale = tl.load(group_ptr + (half * BYTES + step * STEP) // GROUP * BLOCK)
                        sums += of_group.to(tl.float32) * scale[:, None]
        codes_ptr += onward
        group_ptr += GROUPS * BLOCK
        x_ptr += COLUMNS * x_I

    held = here & (row < rows)[:, None]
    if SPLIT == 1:
        _store(
            out_ptr, sums, x_scale_ptr, x_zero_ptr, scale_ptr, sums_ptr, bias_ptr, row, token,
            rows, tokens, BY_TOKEN, ZERO, BIAS, INT4, GROUP,
        )  # fmt: skip
    else:
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        parts_ptr += tl.cast(tile, tl.int64) * (ROWS * TOKENS)
        stride = tl.cast(count, tl.int64) * (ROWS * TOKENS)
        tl.store(parts_ptr + span * stride + at, sums, mask=held)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals_ptr + tile, 0)
            whole = tl.zeros((ROWS, TOKENS), SUMS)
            for other in tl.static_range(SPLIT):
                of = parts_ptr + other * stride + at
                whole += tl.load(of, mask=held, other=0, cache_modifier=".cg")
            _store(
                out_ptr, whole, x_scale_ptr, x_zero_ptr, scale_ptr, sums_ptr, bias_ptr, row, token,
                rows, tokens, BY_TOKEN, ZERO, BIAS, INT4, GROUP,
            )  # fmt: skip


@triton.jit
def _store(
    out_ptr,
    sums,
    x_scale_ptr,
    x_zero_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    row,
    token,
    rows,
    tokens,
    BY_TOKEN: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
):
    y = sums.to(tl.float32)
    if INT4:
        y *= 1 / 16
    if GROUP == 0:
        y *= tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if ZERO:
        zero = tl.load(x_zero_ptr + token, mask=token < tokens, other=0.0)
        y -= zero[None, :] * tl.load(sums_ptr + row, mask=row < rows, other=0.0)[:, None]
    if BY_TOKEN:
        y *= tl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)[None, :]
    else:
        y *= tl.load(x_scale_ptr)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = tl.cast(token, tl.int64)[None, :] * rows + row[:, None]
    held = (token < tokens)[None, :] & (row < rows)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _bytes(stored, HALF: tl.constexpr, PTX: tl.constexpr):
    """Sixteen times the codes in the low or the high halves of bytes."""
    if PTX:
        if HALF == 0:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }",
                "=r,r", [stored], tl.int8, True, 4,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xf0f0f0f0;", "=r,r", [stored], tl.int8, True, 4
        )
    if HALF == 0:
        return (stored.to(tl.int32) << 4).to(tl.int8)
    return (stored.to(tl.int32) & 0xF0).to(tl.int8)
