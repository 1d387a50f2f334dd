"""The product of whole codes on Hopper: a warp of its own brings both operands, ahead of the rest.

The tensor memory accelerator puts 128 columns of a tile's rows and of its tokens where matrix units
read them, in Gluon, which lets a program say when it waits: no product is waited for before the
next is begun. (float8's sums within a product have fewer bits than float32, so those of 128 columns
would be waited for and added up: slower by 21 to 38 per cent than the vendor's, as tried.)

Spans of columns are added up as in `fused.py`: by the last of a tile's programs to come, in their
order. Operands have 16-byte aligned rows.
"""

from functools import partial

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkernels.arrivals import arrivals
from quantkernels.dependent import later
from quantkernels.devices import capability
from quantkernels.launches import Launch
from quantkernels.w8a8.weight import Weight8
from quantkernels.weight_only.overlapped import COPYING, REGISTERS, copied
from quantkernels.weight_only.overlapped_ending import barrier, dependently, store

UNIT = gl.constexpr(128)  # columns that are copied at once
TURN = gl.constexpr(256)  # two of them
BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def takes(codes_TI: Tensor, weight: Weight8) -> bool:
    """Whether these are whole codes that the accelerator of memory reads, and there is one."""
    aligned = all(
        codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0
        for codes in (codes_TI, weight.codes_OI)
    )
    whole = codes_TI.dtype == torch.int8
    return whole and aligned and capability(codes_TI.device) == (9, 0)


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
    tokens, columns = codes_TI.shape
    rows = weight.features[0]
    device = codes_TI.device
    out_TO = torch.empty(tokens, rows, dtype=dtype, device=device)
    count = triton.cdiv(rows, launch.rows) * triton.cdiv(tokens, launch.tokens)
    turns = triton.cdiv(columns, TURN.value)
    split = min(launch.split, turns)
    parts = counters = out_TO
    if split > 1:
        size = (count, split, launch.rows, launch.tokens)
        parts = torch.empty(size, dtype=torch.int32, device=device)
        counters = arrivals(device, count)
    grid = (count * split,)
    run = partial(overlapped.warmup, grid=grid) if compile_only else overlapped[grid]
    run(
        TensorDescriptor.from_tensor(codes_TI, [launch.tokens, UNIT.value], BYTES),
        TensorDescriptor.from_tensor(weight.codes_OI, [launch.rows, UNIT.value], BYTES),
        scale_T,
        weight.scale_O,
        scale_T if bias_O is None else bias_O,
        out_TO,
        parts,
        counters,
        tokens,
        rows,
        turns,
        split,
        BY_TOKEN=scale_T.numel() > 1,
        BIAS=bias_O is not None,
        ROWS=launch.rows,
        TOKENS=launch.tokens,
        SHARED=split > 1,
        STAGES=launch.stages,
        WARPS=launch.warps,
        **later(device),
        num_warps=launch.warps,
        maxnreg=REGISTERS[launch.warps],
    )
    return out_TO


@gluon.jit
def overlapped(
    x_desc,
    codes_desc,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    tokens,
    rows,
    turns,
    split,
    BY_TOKEN: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    dependently("wait", LATER)
    own = gl.program_id(0)
    tile, span = own, 0
    if SHARED:
        tile, span = own // split, own % split
    first, last = turns * span // split, turns * (span + 1) // split
    across = gl.cdiv(tokens, TOKENS)
    top, token = tile // across * ROWS, tile % across * TOKENS
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, UNIT], x_desc.layout)
    codes_smem = gl.allocate_shared_memory(
        codes_desc.dtype, [STAGES, ROWS, UNIT], codes_desc.layout
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
                    x_scale_ptr, scale_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, x_smem,
                    codes_smem, full, done, tile, top, token, first, last, tokens, rows, split,
                    BY_TOKEN, BIAS, ROWS, TOKENS, SHARED, STAGES, WARPS, LATER,
                ),
            ),
            (
                _bring,
                (
                    x_desc, codes_desc, x_smem, codes_smem, full, done, top, token, first * 2,
                    last * 2, ROWS, TOKENS, STAGES, LATER,
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
    top,
    token,
    begin,
    end,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    LATER: gl.constexpr,
):
    """The copies of units from one to another; beyond the last column are zeros."""
    dependently("wait", LATER)
    for unit in range(begin, end):
        at = unit - begin
        stage = at % STAGES
        mbarrier.wait(done.index(stage), (at // STAGES & 1) ^ 1)  # the first round's at once
        here = full.index(stage)
        mbarrier.expect(here, (ROWS + TOKENS) * UNIT)
        copied(codes_desc, [top, unit * UNIT], here, codes_smem.index(stage))
        copied(x_desc, [token, unit * UNIT], here, x_smem.index(stage))


@gluon.jit
def _multiply(
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    x_smem,
    codes_smem,
    full,
    done,
    tile,
    top,
    token,
    first,
    last,
    tokens,
    rows,
    split,
    BY_TOKEN: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    """A tile's sums, of its turns from one to another, to memory."""
    AT_ONCE: gl.constexpr = min(TOKENS, 128)  # whole codes have no wider product
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, AT_ONCE, 32])
    gl.assume(first < last)  # a way around the loop has ptxas wait for each product (C7515)
    sums = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.int32, layout))
    for turn in range(first, last):
        for half in gl.static_range(2):
            at = (turn - first) * 2 + half
            stage = at % STAGES
            mbarrier.wait(full.index(stage), at // STAGES & 1)
            codes, x = codes_smem.index(stage), x_smem.index(stage).permute((1, 0))
            sums = warpgroup_mma(codes, x, sums, is_async=True)
            sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[sums]))
            free = done.index((at + STAGES - 1) % STAGES)  # the unit before is done with
            mbarrier.arrive(free, count=1, pred=at > 0)
    total = warpgroup_mma_wait(0, deps=[sums])
    _finish(
        x_scale_ptr, scale_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, total, tile, top,
        token, tokens, rows, split, BY_TOKEN, BIAS, ROWS, TOKENS, SHARED, WARPS, LATER,
    )  # fmt: skip


@gluon.jit
def _finish(
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    total,
    tile,
    top,
    token,
    tokens,
    rows,
    split,
    BY_TOKEN: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARED: gl.constexpr,
    WARPS: gl.constexpr,
    LATER: gl.constexpr,
):
    """Where a tile has several spans, the last program to come adds them up, in their order."""
    layout: gl.constexpr = total.type.layout
    if not SHARED:
        dependently("launch_dependents", LATER)
        _scaled(
            total, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, top, token, rows, tokens,
            BY_TOKEN, BIAS, ROWS, TOKENS, WARPS,
        )  # fmt: skip
    else:
        of_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        of_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
        parts_ptr += gl.expand_dims(of_row, 1) * TOKENS + gl.expand_dims(of_token, 0)
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
            _scaled(
                total, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, top, token, rows, tokens,
                BY_TOKEN, BIAS, ROWS, TOKENS, WARPS,
            )  # fmt: skip


@gluon.jit
def _scaled(
    total,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    top,
    token,
    rows,
    tokens,
    BY_TOKEN: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = total.type.layout
    row = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    scale = gl.load(scale_ptr + row, mask=row < rows, other=0.0).to(gl.float32)
    y = total.to(gl.float32) * gl.expand_dims(scale, 1)
    if BY_TOKEN:
        asked = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
        y *= gl.expand_dims(gl.load(x_scale_ptr + asked, mask=asked < tokens, other=0.0), 0)
    else:
        y *= gl.load(x_scale_ptr)
    store(y, out_ptr, bias_ptr, top, token, rows, tokens, BIAS, ROWS, TOKENS, WARPS)
