"""Products of 8-bit inputs in Triton: whole codes summed in int32, float8 in float32.

A program owns some rows of the weight, some tokens and a span of the columns; the weight's codes
are the left operand. Spans are added up as in `weight_only`: by the last program of a tile, in
their order.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.arrivals import arrivals
from quantkernels.dependent import later, release, wait
from quantkernels.launches import Launch
from quantkernels.w8a8.weight import Weight8

COLUMNS = tl.constexpr(128)  # of a product
AHEAD_BYTES = 16_384  # of its codes, that a program has fetched while it waits
SECTOR = tl.constexpr(32)  # bytes of a line of the L2 cache, the least that comes from memory


def linear(
    codes_TI: Tensor,
    scale_T: Tensor,
    weight: Weight8,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    launch: Launch,
    *,
    compile_only: bool = False,
) -> Tensor:
    if launch.overlapped and codes_TI.device.type in ("cuda", "meta"):
        from quantkernels.w8a8 import overlapped

        if compile_only or overlapped.takes(codes_TI, weight):
            return overlapped.linear(
                codes_TI, scale_T, weight, bias_O, dtype, launch, compile_only=compile_only
            )
    tokens, columns = codes_TI.shape
    rows = weight.features[0]
    device = codes_TI.device
    out_TO = torch.empty(tokens, rows, dtype=dtype, device=device)
    count = triton.cdiv(rows, launch.rows) * triton.cdiv(tokens, launch.tokens)
    pieces = triton.cdiv(columns, COLUMNS.value)
    split = min(launch.split, pieces)
    parts = counters = out_TO
    if split > 1:
        kept = torch.float32 if weight.kind == "float8" else torch.int32
        parts = torch.empty(split, count, launch.rows, launch.tokens, dtype=kept, device=device)
        counters = arrivals(device, count)
    grid = (count * split,)
    run = partial(_linear.warmup, grid=grid) if compile_only else _linear[grid]
    launched = later(device)
    run(
        codes_TI,
        scale_T,
        weight.codes_OI,
        weight.scale_O,
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
        weight.codes_OI.stride(0),
        scale_T.numel() > 1,
        bias_O is not None,
        columns % COLUMNS.value == 0,
        launch.rows,
        launch.tokens,
        split,
        launch.stages,
        AHEAD=_ahead(launch.rows) if launched["LATER"] else 0,
        **launched,
        num_warps=launch.warps,
    )
    return out_TO


def _ahead(rows: int) -> int:
    """Pieces of the columns."""
    pieces: int = triton.next_power_of_2(triton.cdiv(AHEAD_BYTES, rows * COLUMNS.value))
    return pieces


@triton.jit
def _linear(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
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
    BY_TOKEN: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    LATER: tl.constexpr,
    AHEAD: tl.constexpr,
):
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    NONE: tl.constexpr = 0 if WHOLE else 0.0
    SUMS: tl.constexpr = tl.int32 if WHOLE else tl.float32

    own = tl.program_id(0)
    count = tl.num_programs(0) // SPLIT
    tile, span = own // SPLIT, own % SPLIT
    first, last = pieces * span // SPLIT, pieces * (span + 1) // SPLIT
    across = tl.cdiv(tokens, TOKENS)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    here = (token < tokens)[None, :]
    # rows past the end are read as the last one, and not kept
    some = tl.cast(tl.minimum(row, rows - 1), tl.int64)
    if AHEAD > 0:
        sector = first * COLUMNS + tl.arange(0, AHEAD * (COLUMNS // SECTOR)) * SECTOR
        sector = tl.minimum(sector, columns - 1)
        _fetch(codes_ptr + some[:, None] * codes_O + sector[None, :])
        _fetch(scale_ptr + some)
    wait(LATER)
    codes_ptr += some[:, None] * codes_O + (first * COLUMNS + column)[None, :]
    x_ptr += tl.cast(token, tl.int64)[None, :] * x_T + (first * COLUMNS + column[:, None]) * x_I
    sums = tl.zeros((ROWS, TOKENS), SUMS)
    for piece in tl.range(first, last, num_stages=STAGES):
        if EVEN:
            codes = tl.load(codes_ptr)
            x = tl.load(x_ptr, mask=here, other=NONE)
        else:
            there = column < columns - piece * COLUMNS
            codes = tl.load(codes_ptr, mask=there[None, :], other=NONE)
            x = tl.load(x_ptr, mask=here & there[:, None], other=NONE)
        if WHOLE:
            sums = tl.dot(codes, x, sums, out_dtype=tl.int32)
        else:
            sums += tl.dot(codes, x)  # 128 columns: units sum float8 in fewer bits
        codes_ptr += COLUMNS
        x_ptr += COLUMNS * x_I

    held = here & (row < rows)[:, None]
    if SPLIT == 1:
        release(LATER)
        _store(
            out_ptr, sums, x_scale_ptr, scale_ptr, bias_ptr, row, token, rows, tokens,
            BY_TOKEN, BIAS,
        )  # fmt: skip
    else:
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        parts_ptr += tl.cast(tile, tl.int64) * (ROWS * TOKENS)
        stride = tl.cast(count, tl.int64) * (ROWS * TOKENS)
        tl.store(parts_ptr + span * stride + at, sums, mask=held)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        release(LATER)
        if arrived == SPLIT - 1:
            tl.store(arrivals_ptr + tile, 0)
            whole = tl.zeros((ROWS, TOKENS), SUMS)
            for other in tl.static_range(SPLIT):
                of = parts_ptr + other * stride + at
                whole += tl.load(of, mask=held, other=0, cache_modifier=".cg")
            _store(
                out_ptr, whole, x_scale_ptr, scale_ptr, bias_ptr, row, token, rows, tokens,
                BY_TOKEN, BIAS,
            )  # fmt: skip


@triton.jit
def _fetch(ptrs):
    """The sectors of the bytes that are pointed to, to the L2 cache: nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit
def _store(
    out_ptr,
    sums,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    row,
    token,
    rows,
    tokens,
    BY_TOKEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    y = sums.to(tl.float32)
    y *= tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if BY_TOKEN:
        y *= tl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)[None, :]
    else:
        y *= tl.load(x_scale_ptr)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = tl.cast(token, tl.int64)[None, :] * rows + row[:, None]
    held = (token < tokens)[None, :] & (row < rows)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)
