"""The product for many tokens on Hopper: codes become values while matrix units multiply others.

The same tiles and the same sums as `product.py`'s with scaled values, in Gluon, which lets a
program say when it waits. A turn's 256 columns are four products of 64: while one is under way, the
values of the next are made, and no product is waited for before another is begun. (Triton's own
pipeline waits for each product whose left operand is in registers.)

A warp of its own has the tensor memory accelerator bring tiles and inputs, some units ahead, into
places that the others have done with: a unit is 128 columns of the tiles, or 64 of 8-bit codes, and
the inputs beside them. Of short ones more are under way; long ones are waited for half as often.

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
from quantkernels.dependent import later
from quantkernels.devices import capability
from quantkernels.launches import BITS, Launch
from quantkernels.weight_only import tiles
from quantkernels.weight_only.overlapped_ending import dependently, finish
from quantkernels.weight_only.registers import halves_of, of_groups
from quantkernels.weight_only.tiles import Tiles
from quantkernels.weight_only.unpack import excess, unpacking

BLOCK = gl.constexpr(tiles.ROWS)
WORDS = gl.constexpr(tiles.WORDS)
TURN = gl.constexpr(256)  # columns
# as Triton calls it from 3.7 on, and before
copied = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
INPUTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
CODES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
# of a thread, by the warps that multiply: Triton gives a warp of copies what a group of four has
REGISTERS = {4: 128, 8: 168}
COPYING = gl.constexpr(24)  # registers of its threads, the fewest that can be asked for


def takes(x_TI: Tensor) -> bool:
    """Whether the accelerator of memory reads such inputs, and there is one."""
    aligned = x_TI.stride(1) == 1 and x_TI.stride(0) % 8 == 0 and x_TI.data_ptr() % 16 == 0
    return aligned and capability(x_TI.device) == (9, 0)


def unit_of(launch: Launch, bits: int) -> int:
    """Columns that are copied at once: 64 bytes of codes in a row, or as many again."""
    return min(max(launch.turn, 512 // bits), 128)


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
    turns = triton.cdiv(columns, TURN.value)
    split = min(launch.split, turns)
    parts = counters = out_TO
    if split > 1:
        parts = torch.empty(count, split, height, launch.tokens, device=x_TI.device)
        counters = arrivals(x_TI.device, count)
    grid = (count * split,)
    run = partial(overlapped.warmup, grid=grid) if compile_only else overlapped[grid]
    codes_LW = weight.codes_RPBW.view(-1, tiles.WORDS)  # lines of all tiles, one after another
    zero = "none" if weight.zero is None else weight.grid
    run(
        TensorDescriptor.from_tensor(x_TI, [launch.tokens, 64], INPUTS),
        TensorDescriptor.from_tensor(codes_LW, [tiles.ROWS, tiles.WORDS], CODES),
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        x_TI if bias_O is None else bias_O,
        out_TO,
        parts,
        counters,
        tokens,
        rows,
        turns,
        split,
        BIAS=bias_O is not None,
        ROWS=height,
        TOKENS=launch.tokens,
        SHARED=split > 1,
        STAGES=launch.stages,
        UNIT=unit_of(launch, BITS[weight.kind]),
        BITS=BITS[weight.kind],
        GROUP=weight.group,
        ZERO=zero,
        EXCESS=excess(weight.kind, x_TI.dtype),
        PTX=unpacking(weight.kind, x_TI.dtype, zero, scaled=weight.group > 0),
        WARPS=launch.warps,
        **later(x_TI.device),
        num_warps=launch.warps,
        maxnreg=REGISTERS[launch.warps],
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
    split,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    STAGES: gl.constexpr,
    UNIT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO: gl.constexpr,
    EXCESS: gl.constexpr,
    PTX: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    UNITS: gl.constexpr = TURN // UNIT
    HALVES: gl.constexpr = UNIT // 64
    PIECES: gl.constexpr = UNIT * BITS // 512  # of a unit's codes: 64 bytes of a row
    dependently("wait", LATER)
    own = gl.program_id(0)
    tile, span = own, 0
    if SHARED:
        tile, span = own // split, own % split
    first, last = turns * span // split, turns * (span + 1) // split
    across = gl.cdiv(tokens, TOKENS)
    down, token = tile // across, tile % across * TOKENS
    x_smem, codes_smem = (), ()
    for _ in gl.static_range(HALVES):
        x_smem += (gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 64], x_desc.layout),)
    for _ in gl.static_range(PIECES):
        codes_smem += (
            gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, WORDS], codes_desc.layout),
        )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
        mbarrier.init(done.index(at), count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    scale_ptr, zero_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, x_smem,
                    codes_smem, full, done, tile, down, token, first, last, tokens, rows, turns,
                    split, BIAS, ROWS, TOKENS, SHARED, STAGES, UNIT, BITS, GROUP, ZERO, EXCESS,
                    PTX, WARPS, LATER,
                ),
            ),
            (
                _bring,
                (
                    x_desc, codes_desc, x_smem, codes_smem, full, done, down, token, first * UNITS,
                    last * UNITS, turns * UNITS, ROWS, TOKENS, STAGES, HALVES, PIECES, LATER,
                ),
            ),
        ],
        [1],
        [COPYING],
    )  # fmt: skip


@gluon.jit
def _bring(
    x_desc,
    codes_desc,
    x_smem,
    codes_smem,
    full,
    done,
    down,
    token,
    begin,
    end,
    units,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
    PIECES: gl.constexpr,
    LATER: gl.constexpr,
):
    """The copies of units from one to another, of so many of a tile's."""
    dependently("wait", LATER)
    for unit in range(begin, end):
        at = unit - begin
        stage = at % STAGES
        mbarrier.wait(done.index(stage), (at // STAGES & 1) ^ 1)  # the first round's at once
        here = full.index(stage)
        mbarrier.expect(here, PIECES * ROWS * 64 + HALVES * TOKENS * 128)
        for of_tile in gl.static_range(ROWS // BLOCK):
            for piece in gl.static_range(PIECES):
                block = (down * (ROWS // BLOCK) + of_tile) * units + unit
                into = codes_smem[piece].index(stage).slice(of_tile * BLOCK, BLOCK)
                copied(codes_desc, [(block * PIECES + piece) * BLOCK, 0], here, into)
        for half in gl.static_range(HALVES):
            column = (unit * HALVES + half) * 64
            copied(x_desc, [token, column], here, x_smem[half].index(stage))


@gluon.jit
def _multiply(
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    x_smem,
    codes_smem,
    full,
    done,
    tile,
    down,
    token,
    first,
    last,
    tokens,
    rows,
    turns,
    split,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    STAGES: gl.constexpr,
    UNIT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO: gl.constexpr,
    EXCESS: gl.constexpr,
    PTX: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    """A tile's sums, of its turns from one to another, to memory."""
    UNITS: gl.constexpr = TURN // UNIT
    HALVES: gl.constexpr = UNIT // 64
    PIECES: gl.constexpr = UNIT * BITS // 512
    GROUPS: gl.constexpr = TURN // GROUP if GROUP > 0 else 0  # of a turn
    dtype: gl.constexpr = x_smem[0].dtype
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    # of groups a turn ahead where registers are left, for memory takes its time; else when due
    WANTED: gl.constexpr = ZERO != "none"
    FAR: gl.constexpr = GROUPS <= 4 and not (GROUPS == 4 and WANTED)
    gl.assume(first < last)  # a way around the loop has ptxas wait for each product (C7515)
    inside = gl.arange(0, ROWS, layout=gl.SliceLayout(1, left))
    block = down * (ROWS // BLOCK) + inside // BLOCK
    scales = of_groups(scale_ptr, block, inside, first, turns, True, GROUPS)
    zeros = of_groups(zero_ptr, block, inside, first, turns, WANTED, GROUPS)
    sums = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, sums_layout))
    for turn in range(first, last):
        more = turn + 1 < last
        if FAR:
            next_scales = of_groups(scale_ptr, block, inside, turn + 1, turns, more, GROUPS)
            next_zeros = of_groups(zero_ptr, block, inside, turn + 1, turns, more & WANTED, GROUPS)
        made = ()
        for half in gl.static_range(4):
            at = (turn - first) * UNITS + half // HALVES
            if half % HALVES == 0:
                stage = at % STAGES
                mbarrier.wait(full.index(stage), at // STAGES & 1)
            if half % HALVES < PIECES:
                words = codes_smem[half % HALVES].index(stage).load(left)
            values = halves_of(
                words, scales, zeros, half, left, dtype, BITS, GROUP, ZERO, EXCESS, PTX,
                scale_ptr.dtype.element_ty, zero_ptr.dtype.element_ty,
            )  # fmt: skip
            x = x_smem[half % HALVES].index(stage).permute((1, 0))
            sums = warpgroup_mma(values, x, sums, is_async=True)
            made = made + (values,)  # registers that are read until a product is waited for
            if half == 0:
                sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[sums]))
            else:
                read = [sums, made[half - 1], values]
                sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=read)[0])
            if half % HALVES == 0:  # the unit before is done with
                free = done.index((at + STAGES - 1) % STAGES)
                mbarrier.arrive(free, count=1, pred=at > 0)
        if FAR:
            scales, zeros = next_scales, next_zeros
        else:
            scales = of_groups(scale_ptr, block, inside, turn + 1, turns, more, GROUPS)
            zeros = of_groups(zero_ptr, block, inside, turn + 1, turns, more & WANTED, GROUPS)
    finish(
        out_ptr, bias_ptr, parts_ptr, arrivals_ptr, scale_ptr, warpgroup_mma_wait(0, deps=[sums]),
        tile, down * ROWS, token, tokens, rows, split, BIAS, ROWS, TOKENS, SHARED, GROUP, WARPS,
        LATER,
    )  # fmt: skip
