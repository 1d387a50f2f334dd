"""X^T X on the matrix units: products of 16-bit inputs are exact, sums are float32.

One program owns one tile of the lower triangle and walks down the tokens. Rows of tiles are
visited in groups, so that the columns two neighbours need are still in the cache. Every element
adds the same products in the same order whatever the tile, so tiles are free to differ by width.

Shape suffixes: T = tokens, I = in_features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.bits import GRAM_PIECE, GRAM_STEP
from quantkernels.devices import on_its_device

GROUP_ROWS = 8  # rows of tiles whose tiles run side by side
ALIGNED_BYTES = 16  # a copy into shared memory moves this much at once
SMALL = {"rows": 128, "columns": 128, "num_warps": 8, "num_stages": 2}
NARROW = {"rows": 128, "columns": 128, "num_warps": 4, "num_stages": 4}
WIDE = {"rows": 128, "columns": 256, "num_warps": 8, "num_stages": 3}
WIDE_FROM = 8192  # inputs; below it there are too few large tiles to keep a GPU busy
ROOMY_BYTES = 150_000  # of shared memory, which NARROW and WIDE need
CHECK_ROWS, CHECK_COLUMNS = 4, 1024


@on_its_device
def gram(x_TI: Tensor, out_II: Tensor) -> Tensor:
    return _gram(x_TI, out_II, None, None)


@on_its_device
def gram_of_finite(x_TI: Tensor, out_II: Tensor) -> Tensor:
    tokens, width = x_TI.shape
    keep_T = torch.empty(tokens, dtype=torch.int32, device=x_TI.device)
    dropped = torch.zeros((), dtype=torch.int64, device=x_TI.device)
    if tokens:
        _check_rows[(triton.cdiv(tokens, CHECK_ROWS),)](
            x_TI, keep_T, dropped, tokens, width, *x_TI.stride(), CHECK_ROWS, CHECK_COLUMNS
        )
    # one of the two finds that it has nothing to do: the host need not know which
    _gram(x_TI, out_II, None, dropped)
    _gram(x_TI, out_II, keep_T, dropped)
    return dropped


def _gram(x_TI: Tensor, out_II: Tensor, keep_T: Tensor | None, dropped: Tensor | None) -> Tensor:
    x_TI = _aligned(x_TI)
    width = out_II.shape[0]
    tile = _tile(x_TI.device, width)
    rows, columns = tile["rows"], tile["columns"]
    group_columns = GROUP_ROWS * rows // columns
    groups = triton.cdiv(width, GROUP_ROWS * rows)
    programs = GROUP_ROWS * group_columns * groups * (groups + 1) // 2
    for start in range(0, len(x_TI), GRAM_PIECE):
        piece_TI = x_TI[start : start + GRAM_PIECE]
        _lower_tiles[(programs,)](
            piece_TI,
            None if keep_T is None else keep_T[start:],
            dropped,
            out_II,
            len(piece_TI),
            width,
            piece_TI.stride(0),
            *out_II.stride(),
            rows,
            columns,
            GRAM_STEP,
            GROUP_ROWS,
            group_columns,
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )
    return out_II


def _tile(device: torch.device, width: int) -> dict[str, int]:
    if device.type != "cuda":
        return SMALL
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    if properties["max_shared_mem"] < ROOMY_BYTES:
        return SMALL
    return WIDE if width >= WIDE_FROM else NARROW


def _aligned(x_TI: Tensor) -> Tensor:
    """The same rows where 16-byte copies can reach them; columns of zeros may be added."""
    lane = ALIGNED_BYTES // x_TI.element_size()
    if x_TI.stride(1) == 1 and x_TI.stride(0) % lane == 0 and x_TI.data_ptr() % ALIGNED_BYTES == 0:
        return x_TI
    tokens, width = x_TI.shape
    copy_TI = x_TI.new_empty(tokens, -(-width // lane) * lane)
    copy_TI[:, :width] = x_TI
    return copy_TI


@triton.jit
def _check_rows(
    x_ptr,
    keep_ptr,
    dropped_ptr,
    tokens,
    width,
    stride_T,
    stride_I,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """1 for every token all of whose values are finite, else 0, and how many of the latter."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rows_ptr = x_ptr + tl.cast(token, tl.int64)[:, None] * stride_T
    bad = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for first in range(0, width, COLUMNS):
        inside = (token < tokens)[:, None] & (first + column < width)[None, :]
        columns_ptr = rows_ptr + tl.cast(first + column, tl.int64)[None, :] * stride_I
        x = tl.load(columns_ptr, mask=inside, other=0.0)
        bad |= tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1)
    bad_row = tl.max(bad, axis=1)
    tl.store(keep_ptr + token, 1 - bad_row, mask=token < tokens)
    count = tl.sum(bad_row, axis=0)
    if count > 0:
        tl.atomic_add(dropped_ptr, tl.cast(count, tl.int64))


@triton.jit
def _lower_tiles(
    x_ptr,
    keep_ptr,  # None: every token counts
    dropped_ptr,  # None: add in any case; else if none was dropped or, with keep_ptr, if some were
    out_ptr,
    tokens,
    width,
    stride_T,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    row_tile, column_tile = _place(tl.program_id(0), GROUP_ROWS, GROUP_COLUMNS)
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    due = (first_row < width) & (first_column < first_row + ROWS)
    if dropped_ptr is not None:
        due = due & ((tl.load(dropped_ptr) > 0) == (keep_ptr is not None))
    if due:
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        sum_ = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        token = tl.arange(0, STEP)
        line_ptr = x_ptr + tl.cast(token, tl.int64)[:, None] * stride_T
        left_ptr = line_ptr + row[None, :]
        right_ptr = line_ptr + column[None, :]
        step = tl.cast(stride_T, tl.int64) * STEP
        for start in range(0, tokens, STEP):
            here = start + token < tokens
            if keep_ptr is not None:
                here = tl.load(keep_ptr + start + token, mask=here, other=0) > 0
            left = tl.load(left_ptr, mask=here[:, None] & (row < width)[None, :], other=0.0)
            right = tl.load(right_ptr, mask=here[:, None] & (column < width)[None, :], other=0.0)
            sum_ = tl.dot(left.T, right, sum_)
            left_ptr += step
            right_ptr += step
        at = tl.cast(row, tl.int64)[:, None] * stride_row
        at += tl.cast(column, tl.int64)[None, :] * stride_column
        inside = (row < width)[:, None] & (column < width)[None, :]
        tl.store(out_ptr + at, tl.load(out_ptr + at, mask=inside, other=0.0) + sum_, mask=inside)


@triton.jit
def _place(number, GROUP_ROWS: tl.constexpr, GROUP_COLUMNS: tl.constexpr):
    """A program's tile: group g of rows has g + 1 squares of tiles, the last on the diagonal."""
    SQUARE: tl.constexpr = GROUP_ROWS * GROUP_COLUMNS
    square = number // SQUARE
    group = tl.cast((tl.sqrt(8.0 * tl.cast(square, tl.float32) + 1.0) - 1.0) * 0.5, tl.int32)
    # the root may be off by one either way
    group -= tl.where(group * (group + 1) // 2 > square, 1, 0)
    group += tl.where((group + 1) * (group + 2) // 2 <= square, 1, 0)
    rest = number - SQUARE * (group * (group + 1) // 2)
    return group * GROUP_ROWS + rest % GROUP_ROWS, rest // GROUP_ROWS
