"""The column sweep by V (V V^T = H), in two kernels.

By V and not by U = V^-1 the codes are the same, and no triangular inverse is needed, which took 79
of a solve's 110 ms at a width of 14,336 on one H200. The errors that a row owes to later columns
are products of two bfloat16 parts of each factor, all but the least of the four: off by 2**-17 or
so of the largest, as good as float32's for grids of whole numbers, and a third faster.

`_sweep_block` takes a row of the layer per lane through one block of columns, `COLUMNS` of them
in registers at a time, and rows never meet. `_update` adds what a run of
finished columns owes to later ones: tiles of V^T D, summed over the run in order. So a row's
codes depend on that row alone, whoever shares the call.

Columns far ahead are updated once per SPAN columns, those within the span once per block:
fewer passes over the sums, the same additions.

Shape suffixes: O = rows of the layer, I = its inputs in the order of rounding, G = groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.bits import SWEEP_COLUMNS, SWEEP_PRECISION, SWEEP_SPAN, SWEEP_STEP
from quantkernels.devices import on_its_device
from quantkernels.nearest import to_float8, to_whole
from quantkernels.sweep.reference import Columns

FEW_ROWS = {"rows": 32, "num_warps": 1}
MANY_ROWS = {"rows": 128, "num_warps": 4}
MANY_FROM = 16_384  # rows: below it, small programs reach more of the GPU
UPDATE_INPUTS, UPDATE_ROWS = 128, 128
NEIGHBOURS = 8  # tiles of rows that run side by side and share a tile of V


@on_its_device
def sweep_by_root(w_IO: Tensor, root_II: Tensor, columns: Columns, block_columns: int) -> Tensor:
    """Codes, int8 (I, O); `w_IO` ends as the differences D between weights and their values."""
    width, rows = w_IO.shape
    codes_IO = torch.empty(width, rows, dtype=torch.int8, device=w_IO.device)
    owed_IO = torch.zeros_like(w_IO)
    scale_GO, zero_GO = columns.scale_GO.contiguous(), columns.zero_GO.contiguous()
    # one over the least subnormal scales is infinite, and no code comes of that
    per_scale_GO = scale_GO.reciprocal().clamp_(max=torch.finfo(torch.float32).max)
    per_pivot_I = root_II.diagonal().reciprocal()
    group_of_I = columns.group_of_I.contiguous()
    tile = MANY_ROWS if rows >= MANY_FROM else FEW_ROWS
    span = max(SWEEP_SPAN // block_columns, 1) * block_columns
    for first in range(0, width, span):
        last = min(first + span, width)
        for start in range(first, last, block_columns):
            stop = min(start + block_columns, last)
            _sweep_block[(triton.cdiv(rows, tile["rows"]),)](
                w_IO,
                owed_IO,
                codes_IO,
                root_II,
                per_pivot_I,
                scale_GO,
                per_scale_GO,
                zero_GO,
                group_of_I,
                rows,
                start,
                stop,
                *root_II.stride(),
                columns.qmin,
                columns.qmax,
                columns.grid,
                tile["rows"],
                SWEEP_COLUMNS,
                _precision(w_IO.device),
                num_warps=tile["num_warps"],
                enable_fp_fusion=False,
            )
            _hand_on(owed_IO, w_IO, root_II, (start, stop), last)
        _hand_on(owed_IO, w_IO, root_II, (first, last), width)
    return codes_IO


def _hand_on(
    owed_IO: Tensor, d_IO: Tensor, root_II: Tensor, done: tuple[int, int], last: int
) -> None:
    """owed[stop:last] += V[start:stop, stop:last]^T D[start:stop]"""
    start, stop = done
    if stop == last:
        return
    rows = d_IO.shape[1]
    tiles = triton.cdiv(last - stop, UPDATE_INPUTS) * triton.cdiv(rows, UPDATE_ROWS)
    _update[(tiles,)](
        owed_IO,
        d_IO,
        root_II,
        rows,
        start,
        stop,
        last,
        *root_II.stride(),
        UPDATE_INPUTS,
        UPDATE_ROWS,
        SWEEP_STEP,
        NEIGHBOURS,
        _precision(d_IO.device),
        num_warps=8,
        num_stages=3,
    )


def _precision(device: torch.device) -> str:
    return "ieee" if device.type == "cpu" else SWEEP_PRECISION  # the interpreter knows no other


@triton.jit
def _nearest(moved, scale, per_scale, zero, qmin, qmax, GRID: tl.constexpr):
    """The code of the nearest value of a grid (see quantkernels/grids.py), and that value."""
    if GRID == "affine":
        whole = to_whole(_divided(moved, scale, per_scale))
        code = tl.minimum(tl.maximum(whole + zero, qmin), qmax)
        value = (code - zero) * scale
    elif GRID == "offset":
        whole = to_whole(_divided(moved - zero, scale, per_scale))
        code = tl.minimum(tl.maximum(whole, qmin), qmax)
        value = code * scale + zero
    else:
        tl.static_assert(GRID == "float8", "this grid is not known here")
        code, rounded = to_float8(_divided(moved, scale, per_scale), qmin, qmax)
        value = rounded * scale
    return code, value


@triton.jit
def _divided(x, scale, per_scale):
    """x / scale, rounded as a division would be, without its branch for the rarest operands.

    Loads could not be moved over that.
    """
    steps = tl.minimum(tl.maximum(x * per_scale, -1e9), 1e9)  # an infinite one has no rest
    return tl.fma(tl.fma(-steps, scale, x), per_scale, steps)


@triton.jit(do_not_specialize=["start", "stop", "qmin", "qmax"])
def _sweep_block(
    w_ptr,
    owed_ptr,
    codes_ptr,
    root_ptr,
    per_pivot_ptr,
    scale_ptr,
    per_scale_ptr,
    zero_ptr,
    group_ptr,
    rows,
    start,
    stop,
    stride_row,
    stride_column,
    qmin,
    qmax,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide_rows = tl.cast(rows, tl.int64)
    wide_stride = tl.cast(stride_row, tl.int64)
    for part in range(tl.cdiv(stop - start, COLUMNS)):
        first = start + part * COLUMNS
        if part > 0:  # what the parts before this one owe to it
            c = first + tl.arange(0, COLUMNS)
            sum_ = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for done in range(start, first, COLUMNS):
                k = done + tl.arange(0, COLUMNS)
                v_ptr = root_ptr + k[:, None] * wide_stride + c[None, :] * stride_column
                v = tl.load(v_ptr, mask=(c < stop)[None, :], other=0.0)
                d_ptr = w_ptr + k[:, None] * wide_rows + o[None, :]
                d = tl.load(d_ptr, mask=(o < rows)[None, :], other=0.0)
                sum_ = tl.dot(v.T, d, sum_, input_precision=PRECISION)
            due_ptr = owed_ptr + c[:, None] * wide_rows + o[None, :]
            inside = (c < stop)[:, None] & (o < rows)[None, :]
            tl.store(due_ptr, tl.load(due_ptr, mask=inside, other=0.0) + sum_, mask=inside)
            tl.debug_barrier()  # read below by other lanes
        # past the block's end there are no rows to load and store, and what V says is not read
        owed, w, scale, per_scale, zero, per_pivot = (), (), (), (), (), ()
        for j in tl.static_range(COLUMNS):
            within = first + j < stop
            here = o < tl.where(within, rows, 0)
            at = (first + j) * wide_rows + o
            group = tl.load(group_ptr + first + j, mask=within, other=0) * wide_rows + o
            owed = owed + (tl.load(owed_ptr + at, mask=here, other=0.0),)
            w = w + (tl.load(w_ptr + at, mask=here, other=0.0),)
            scale = scale + (tl.load(scale_ptr + group, mask=here, other=1.0),)
            per_scale = per_scale + (tl.load(per_scale_ptr + group, mask=here, other=1.0),)
            zero = zero + (tl.load(zero_ptr + group, mask=here, other=0.0),)
            per_pivot = per_pivot + (tl.load(per_pivot_ptr + first + j, mask=within, other=1.0),)
        codes, off = (), ()
        for j in tl.static_range(COLUMNS):
            moved = tl.fma(owed[j], per_pivot[j], w[j])
            code, value = _nearest(moved, scale[j], per_scale[j], zero[j], qmin, qmax, GRID)
            d = w[j] - value
            codes = codes + (code,)
            off = off + (d,)
            line_ptr = root_ptr + (first + j) * wide_stride + first * stride_column
            more = ()
            for later in tl.static_range(COLUMNS):
                if later > j:
                    inside = first + later < stop
                    v = tl.load(line_ptr + later * stride_column, mask=inside, other=0.0)
                    more = more + (tl.fma(v, d, owed[later]),)
                else:
                    more = more + (owed[later],)
            owed = more
        for j in tl.static_range(COLUMNS):
            here = o < tl.where(first + j < stop, rows, 0)
            at = (first + j) * wide_rows + o
            tl.store(w_ptr + at, off[j], mask=here)
            tl.store(codes_ptr + at, codes[j].to(tl.int8), mask=here)
        tl.debug_barrier()  # the next part reads these differences


@triton.jit(do_not_specialize=["start", "stop", "last"])
def _update(
    owed_ptr,
    d_ptr,
    root_ptr,
    rows,
    start,
    stop,
    last,
    stride_row,
    stride_column,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    input_tiles = tl.cdiv(last - stop, INPUTS)
    row_tiles = tl.cdiv(rows, ROWS)
    together = NEIGHBOURS * input_tiles
    before = tl.program_id(0) // together * NEIGHBOURS
    beside = min(row_tiles - before, NEIGHBOURS)
    number = tl.program_id(0) % together
    i = stop + number // beside * INPUTS + tl.arange(0, INPUTS)
    o = (before + number % beside) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    wide_rows = tl.cast(rows, tl.int64)
    wide_stride = tl.cast(stride_row, tl.int64)
    root_ptr += (start + k)[:, None] * wide_stride + i[None, :] * stride_column
    d_ptr += (start + k)[:, None] * wide_rows + o[None, :]
    owed_ptr += i[:, None] * wide_rows + o[None, :]
    sum_ = tl.zeros((INPUTS, ROWS), dtype=tl.float32)
    for first in range(start, stop, STEP):
        inside = (first + k < stop)[:, None]
        v = tl.load(root_ptr, mask=inside & (i < last)[None, :], other=0.0)
        d = tl.load(d_ptr, mask=inside & (o < rows)[None, :], other=0.0)
        sum_ = tl.dot(v.T, d, sum_, input_precision=PRECISION)
        root_ptr += wide_stride * STEP
        d_ptr += wide_rows * STEP
    inside = (i < last)[:, None] & (o < rows)[None, :]
    tl.store(owed_ptr, tl.load(owed_ptr, mask=inside, other=0.0) + sum_, mask=inside)
