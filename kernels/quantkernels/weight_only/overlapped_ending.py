"""How a tile's program of the product for many tokens ends, in Gluon: its sums, to memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# as Triton calls it from 3.7 on, and before
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def dependently(WHAT: gl.constexpr, LATER: gl.constexpr):
    """Waits for the kernel before, or releases the next one, as in `dependent.py`."""
    if LATER:
        ptx: gl.constexpr = "griddepcontrol." + WHAT + "; // $0"
        gl.inline_asm_elementwise(ptx, "=r", [], gl.int32, False, 1)


@gluon.jit
def finish(
    out_ptr,
    bias_ptr,
    parts_ptr,
    arrivals_ptr,
    scale_ptr,
    total,
    tile,
    top,
    token,
    tokens,
    rows,
    split,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    """Where a tile has several spans, the last program to come adds them up, in their order."""
    layout: gl.constexpr = total.type.layout
    row = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    if GROUP == 0:
        total *= gl.expand_dims(gl.load(scale_ptr + row).to(gl.float32), 1)
    if not SHARED:
        dependently("launch_dependents", LATER)
        store(total, out_ptr, bias_ptr, top, token, rows, tokens, BIAS, ROWS, TOKENS, WARPS)
    else:
        of_tile = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
        parts_ptr += gl.expand_dims(row - top, 1) * TOKENS + gl.expand_dims(of_tile, 0)
        gl.store(parts_ptr + gl.cast(gl.program_id(0), gl.int64) * (ROWS * TOKENS), total)
        barrier()  # all of this program's sums are written before it says so
        arrived = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        dependently("launch_dependents", LATER)
        if arrived == split - 1:
            gl.store(arrivals_ptr + tile, 0)
            parts_ptr += gl.cast(tile, gl.int64) * (split * ROWS * TOKENS)
            total = gl.load(parts_ptr, cache_modifier=".cg")
            for part in range(1, split):
                total += gl.load(parts_ptr + part * (ROWS * TOKENS), cache_modifier=".cg")
            store(total, out_ptr, bias_ptr, top, token, rows, tokens, BIAS, ROWS, TOKENS, WARPS)


@gluon.jit
def store(
    total,
    out_ptr,
    bias_ptr,
    top,
    token,
    rows,
    tokens,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    row = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    asked = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    if BIAS:
        of_row = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, total.type.layout))
        bias = gl.load(bias_ptr + of_row, mask=of_row < rows, other=0.0).to(gl.float32)
        total += gl.expand_dims(bias, 1)
    y = gl.convert_layout(total.to(out_ptr.dtype.element_ty), layout)
    held = gl.expand_dims(asked < tokens, 0) & gl.expand_dims(row < rows, 1)
    at = gl.expand_dims(gl.cast(asked, gl.int64), 0) * rows + gl.expand_dims(row, 1)
    gl.store(out_ptr + at, y, mask=held)
