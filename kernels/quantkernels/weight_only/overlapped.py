"""The product for many tokens on Hopper: codes become values while matrix units multiply others.

The same tiles and the same sums as `product.py`'s with scaled values, in Gluon, which lets a
program say when it waits. A turn's 128 columns are two products of 64: while one is under way, the
values of the next are made, and no product is waited for before another is begun. (Triton's own
pipeline waits for each product whose left operand is in registers.) Tiles and inputs come by the
tensor memory accelerator, some units ahead: a unit is a piece of the tiles, 64 bytes of a row, with
the inputs beside it. That is a turn of 4-bit codes, and half of one of 8-bit codes.

Inputs have 16-byte aligned rows. Spans of columns are added up as in `ending.py`, by the last of a
tile's programs to come, in their order.
"""

from functools import partial

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkernels.arrivals import arrivals
from quantkernels.devices import capability
from quantkernels.launches import BITS, Launch
from quantkernels.weight_only import tiles
from quantkernels.weight_only.tiles import Tiles
from quantkernels.weight_only.unpack import excess, unpacking

BLOCK = gl.constexpr(tiles.ROWS)
WORDS = gl.constexpr(tiles.WORDS)
# as Triton calls it from 3.7 on, and before
copied = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
TURN = 128  # columns, of which the inputs come by halves
INPUTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
CODES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)


def takes(x_TI: Tensor) -> bool:
    """Whether the accelerator of memory reads such inputs, and there is one."""
    aligned = x_TI.stride(1) == 1 and x_TI.stride(0) % 8 == 0 and x_TI.data_ptr() % 16 == 0
    return aligned and capability(x_TI.device) == (9, 0)


def linear(
    x_TI: Tensor,
    weight: Tiles,
    bias_O: Tensor | None,
    launch: Launch,
    *,
    compile_only: bool = False,
) -> Tensor:
    tokens, columns = x_TI.shape
    rows = weight.features[0]
    out_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    height = tiles.program_rows(rows, launch.rows)
    count = triton.cdiv(rows, height) * triton.cdiv(tokens, launch.tokens)
    turns = triton.cdiv(columns, tiles.COLUMNS) * (tiles.COLUMNS // TURN)
    split = min(launch.split, turns)
    parts = counters = out_TO
    if split > 1:
        parts = torch.empty(split, count, height, launch.tokens, device=x_TI.device)
        counters = arrivals(x_TI.device, count)
    grid = (count * split,)
    run = partial(overlapped.warmup, grid=grid) if compile_only else overlapped[grid]
    codes_LW = weight.codes_RPBW.view(-1, tiles.WORDS)  # lines of all tiles, one after another
    zero = "none" if weight.zero is None else weight.grid
    run(
        TensorDescriptor.from_tensor(x_TI, [launch.tokens, TURN // 2], INPUTS),
        TensorDescriptor.from_tensor(codes_LW, [min(height, tiles.ROWS), tiles.WORDS], CODES),
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        x_TI if bias_O is None else bias_O,
        out_TO,
        parts,
        counters,
        tokens,
        rows,
        turns,
        BIAS=bias_O is not None,
        ROWS=height,
        TOKENS=launch.tokens,
        SPLIT=split,
        STAGES=launch.stages,
        BITS=BITS[weight.kind],
        GROUP=weight.group,
        ZERO=zero,
        EXCESS=excess(weight.kind, x_TI.dtype),
        PTX=unpacking(weight.kind, x_TI.dtype, zero, scaled=weight.group > 0),
        WARPS=launch.warps,
        num_warps=launch.warps,
    )
    return out_TO


@gluon.jit
def overlapped(
    x_desc,
    codes_desc,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    tokens,
    rows,
    turns,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO: gl.constexpr,
    EXCESS: gl.constexpr,
    PTX: gl.constexpr,
    WARPS: gl.constexpr,
):
    PIECES: gl.constexpr = BITS // 4  # units of a turn
    HALVES: gl.constexpr = 2 // PIECES  # of a turn, in a unit
    GROUPS: gl.constexpr = 128 // GROUP if GROUP > 0 else 0  # of a turn
    STEP: gl.constexpr = 1 if scale_ptr.dtype.element_ty == gl.float32 else 2  # 16 bits: by twos
    ZERO_STEP: gl.constexpr = 1 if zero_ptr.dtype.element_ty == gl.float32 else 2
    dtype: gl.constexpr = x_desc.dtype
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)

    own = gl.program_id(0)
    count = gl.num_programs(0) // SPLIT
    tile, span = own // SPLIT, own % SPLIT
    first, last = turns * span // SPLIT, turns * (span + 1) // SPLIT
    gl.assume(first < last)  # with a way around the loop, ptxas waits for each instruction (C7515)
    across = gl.cdiv(tokens, TOKENS)
    top = tile // across * ROWS
    token = tile % across * TOKENS
    x_smem = gl.allocate_shared_memory(dtype, [HALVES * STAGES, TOKENS, 64], x_desc.layout)
    codes_smem = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, WORDS], codes_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
    begin, end, units = first * PIECES, last * PIECES, turns * PIECES
    for at in gl.static_range(STAGES):
        _fetch(
            x_desc, codes_desc, x_smem, codes_smem, full, top, token, begin + at, units, at,
            begin + at < end, ROWS, TOKENS, HALVES,
        )  # fmt: skip

    inside = gl.arange(0, ROWS, layout=gl.SliceLayout(1, left))
    block = top // BLOCK + inside // BLOCK
    place = top % BLOCK + inside % BLOCK
    row_scale_ptr = scale_ptr
    scale_ptr += block * (turns * (GROUPS * BLOCK)) + place * STEP
    zero_ptr += block * (turns * (GROUPS * BLOCK)) + place * ZERO_STEP
    sums = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, sums_layout))
    scales = _of_groups(scale_ptr, first, first < last, GROUPS, STEP)
    zeros = _of_groups(zero_ptr, first, (first < last) & (ZERO != "none"), GROUPS, ZERO_STEP)
    # two turns ahead where registers are left: memory takes longer to answer than a turn
    FAR: gl.constexpr = GROUPS <= 2
    following = _of_groups(scale_ptr, first + 1, FAR & (first + 1 < last), GROUPS, STEP)
    for turn in range(first, last):
        unit = (turn - first) * PIECES
        if FAR:
            far = _of_groups(scale_ptr, turn + 2, turn + 2 < last, GROUPS, STEP)
        stage = unit % STAGES
        mbarrier.wait(full.index(stage), unit // STAGES & 1)
        words = codes_smem.index(stage).load(left)
        one = _values(words, scales, zeros, 0, left, dtype, BITS, GROUP, ZERO, EXCESS, PTX)
        sums = warpgroup_mma(one, x_smem.index(HALVES * stage).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[sums]))
        # the unit before is done with, by this warp; and by all at the barrier that a copy asks for
        more = begin + unit + STAGES - 1
        _fetch(
            x_desc, codes_desc, x_smem, codes_smem, full, top, token, more, units,
            (unit + STAGES - 1) % STAGES, (unit > 0) & (more < end), ROWS, TOKENS, HALVES,
        )  # fmt: skip
        if PIECES == 2:
            stage = (unit + 1) % STAGES
            mbarrier.wait(full.index(stage), (unit + 1) // STAGES & 1)
            words = codes_smem.index(stage).load(left)
        other = _values(words, scales, zeros, 1, left, dtype, BITS, GROUP, ZERO, EXCESS, PTX)
        later = turn + 1
        if FAR:
            scales, following = following, far
        else:
            scales = _of_groups(scale_ptr, later, later < last, GROUPS, STEP)
        zeros = _of_groups(zero_ptr, later, (later < last) & (ZERO != "none"), GROUPS, ZERO_STEP)
        x_last = x_smem.index(HALVES * stage + HALVES - 1)
        sums = warpgroup_mma(other, x_last.permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[sums, one, other])[0])
        if PIECES == 2:
            more = begin + unit + STAGES
            _fetch(
                x_desc, codes_desc, x_smem, codes_smem, full, top, token, more, units,
                unit % STAGES, more < end, ROWS, TOKENS, HALVES,
            )  # fmt: skip
    total = warpgroup_mma_wait(0, deps=[sums])
    x_smem._keep_alive()
    codes_smem._keep_alive()
    row = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums_layout))
    asked = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, sums_layout))
    if GROUP == 0:
        total *= gl.expand_dims(gl.load(row_scale_ptr + row).to(gl.float32), 1)
    if SPLIT == 1:
        _store(total, out_ptr, bias_ptr, top, token, rows, tokens, BIAS, ROWS, TOKENS, WARPS)
    else:
        held = gl.expand_dims(asked < tokens, 0) & gl.expand_dims(row < rows, 1)
        place = gl.expand_dims(row - top, 1) * TOKENS + gl.expand_dims(asked - token, 0)
        parts_ptr += gl.cast(tile, gl.int64) * (ROWS * TOKENS)
        stride = gl.cast(count, gl.int64) * (ROWS * TOKENS)
        gl.store(parts_ptr + span * stride + place, total, mask=held)
        barrier()  # all of this program's sums are written before it says so
        if gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            gl.store(arrivals_ptr + tile, 0)
            total = gl.zeros([ROWS, TOKENS], gl.float32, sums_layout)
            for part in gl.static_range(SPLIT):
                of = parts_ptr + part * stride + place
                total += gl.load(of, mask=held, other=0.0, cache_modifier=".cg")
            _store(total, out_ptr, bias_ptr, top, token, rows, tokens, BIAS, ROWS, TOKENS, WARPS)


@gluon.jit
def _fetch(
    x_desc,
    codes_desc,
    x_smem,
    codes_smem,
    full,
    top,
    token,
    unit,
    units,
    stage,
    wanted,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Begins to copy a unit's inputs and codes."""
    LINES: gl.constexpr = min(ROWS, 128)  # of a block, at once
    here = full.index(stage)
    mbarrier.expect(here, TOKENS * HALVES * 128 + ROWS * 64, pred=wanted)
    for half in gl.static_range(HALVES):
        column = (unit * HALVES + half) * 64
        copied(x_desc, [token, column], here, x_smem.index(HALVES * stage + half), wanted)
    for block in gl.static_range(ROWS // LINES):
        line = ((top // 128 + block) * units + unit) * 128
        into = codes_smem.index(stage).slice(block * LINES, LINES)
        copied(codes_desc, [line + top % 128, 0], here, into, wanted)


@gluon.jit
def _of_groups(ptr, turn, wanted, GROUPS: gl.constexpr, STEP: gl.constexpr):
    """A turn's scales, or zero points, of each row: as many as it has groups, as they are kept."""
    NEXT: gl.constexpr = 128 if STEP == 1 else 1  # from a pair's first to its second
    if GROUPS == 0:
        return ()
    elif GROUPS == 1:
        at = (turn >> 1) * 256 + (turn & 1) * NEXT
        return (gl.load(ptr + at, mask=wanted, other=0.0),)
    elif GROUPS == 2:
        ptr += turn * 256
        return (
            gl.load(ptr, mask=wanted, other=0.0),
            gl.load(ptr + NEXT, mask=wanted, other=0.0),
        )
    else:
        ptr += turn * 512
        return (
            gl.load(ptr, mask=wanted, other=0.0),
            gl.load(ptr + NEXT, mask=wanted, other=0.0),
            gl.load(ptr + 256, mask=wanted, other=0.0),
            gl.load(ptr + 256 + NEXT, mask=wanted, other=0.0),
        )


@gluon.jit
def _values(
    words,
    scales,
    zeros,
    HALF: gl.constexpr,
    left: gl.constexpr,
    dtype: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO: gl.constexpr,
    EXCESS: gl.constexpr,
    PTX: gl.constexpr,
):
    """A turn's first or second 64 columns, as the left operand: two parts of the words."""
    PART: gl.constexpr = 2 * HALF if BITS == 4 else 0
    one = _part(words, scales, zeros, PART, 2 * HALF, dtype, GROUP, ZERO, EXCESS, PTX)
    other = _part(words, scales, zeros, PART + 1, 2 * HALF + 1, dtype, GROUP, ZERO, EXCESS, PTX)
    both = gl.join(one, other).permute((0, 2, 1))
    return gl.convert_layout(both.reshape([both.shape[0], 64]), left, assert_trivial=True)


@gluon.jit
def _part(
    words,
    scales,
    zeros,
    PART: gl.constexpr,
    PLACE: gl.constexpr,
    dtype: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO: gl.constexpr,
    EXCESS: gl.constexpr,
    PTX: gl.constexpr,
):
    ptx: gl.constexpr = PTX[PART]
    args = [words]
    if GROUP > 0:
        OF: gl.constexpr = PLACE * 32 // GROUP
        if ZERO == "affine":
            args = args + [_wide(-(zeros[OF].to(gl.float32) + EXCESS), words, dtype)]
        args = args + [_wide(scales[OF], words, dtype)]
        if ZERO == "offset":
            args = args + [_wide(zeros[OF], words, dtype)]
    operands: gl.constexpr = "=r" + ",r" * len(args)
    return gl.inline_asm_elementwise(ptx, operands, args, dtype.value, True, 2)


@gluon.jit
def _wide(of_rows, like, dtype: gl.constexpr):
    wide, _ = gl.broadcast(gl.expand_dims(of_rows.to(dtype), 1), like)
    return wide


@gluon.jit
def _store(
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
