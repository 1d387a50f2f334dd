"""The end of a product's program: its sums, or what it adds to those of others, to memory."""

import triton
import triton.language as tl

from quantkernels.dependent import release


@triton.jit
def finish(
    out_ptr,
    bias_ptr,
    parts_ptr,
    arrivals_ptr,
    sums,
    row_scale,
    tile,
    span,
    count,
    row,
    token,
    rows,
    tokens,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    LATER: tl.constexpr,
):
    """Where a tile has several spans, the last program to come adds them up, in their order."""
    held = (token < tokens)[None, :] & (row < rows)[:, None]
    if SPLIT == 1:
        release(LATER)
        store(out_ptr, bias_ptr, sums * row_scale, row, token, rows, held, BIAS)
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
            whole = tl.zeros((ROWS, TOKENS), tl.float32)
            for other in tl.static_range(SPLIT):
                of = parts_ptr + other * stride + at
                whole += tl.load(of, mask=held, other=0.0, cache_modifier=".cg")
            store(out_ptr, bias_ptr, whole * row_scale, row, token, rows, held, BIAS)


@triton.jit
def store(out_ptr, bias_ptr, sums, row, token, rows, held, BIAS: tl.constexpr):
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = tl.cast(token, tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=held)
