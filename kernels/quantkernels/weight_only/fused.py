"""The weight-only product in Triton: tiles of codes become values in registers, and stay there.

A program owns some rows of the weight, some tokens and a span of the columns. The weight is the
left operand of its products, so that unpacked values never leave the registers; x is the right one.
`product.py` is its kernel.
A group's scale multiplies its sums in float32 ("late") or, where many tokens would make that dear,
its values in x's dtype before ("early"). Where a tile's columns are split into spans, every program
writes its float32 sums, and the last to come adds them up in the order of the spans: the same bits
in every run.

PTX is for CUDA; elsewhere the same is said in plain operations, and for bfloat16 on GPUs before
Hopper, which add and multiply no pairs of it. Shapes may be any: rows and columns
are padded in the tiles, tokens and columns are masked.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.arrivals import arrivals
from quantkernels.dependent import later
from quantkernels.devices import capability, on_its_device
from quantkernels.launches import BITS, Codes, Launch
from quantkernels.weight_only import tiles
from quantkernels.weight_only.product import product
from quantkernels.weight_only.tiles import Tiles
from quantkernels.weight_only.unpack import excess, unpacking
from quantkernels.weight_only.values import values_of

BLOCK = tl.constexpr(tiles.ROWS)
WORDS = tl.constexpr(tiles.WORDS)


def linear(
    x_TI: Tensor,
    weight: Tiles,
    bias_O: Tensor | None,
    launch: Launch,
    *,
    compile_only: bool = False,
) -> Tensor:
    x_TI = apart(x_TI)
    if launch.overlapped and x_TI.device.type in ("cuda", "meta"):
        from quantkernels.weight_only import overlapped

        if compile_only or overlapped.takes(x_TI):
            return overlapped.linear(x_TI, weight, bias_O, launch, compile_only=compile_only)
    tokens, columns = x_TI.shape
    rows = weight.features[0]
    out_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    height = tiles.program_rows(rows, launch.rows)
    count = triton.cdiv(rows, height) * triton.cdiv(tokens, launch.tokens)
    piece = 16 // BITS[weight.kind] * tiles.WORDS
    turn = max(launch.turn, piece, weight.group)  # another kind's launch, or another group's
    turns = triton.cdiv(columns, tiles.COLUMNS) * (tiles.COLUMNS // turn)
    split = min(launch.split, turns)
    parts = counters = out_TO
    if split > 1:
        parts = torch.empty(split, count, height, launch.tokens, device=x_TI.device)
        counters = arrivals(x_TI.device, count)
    grid = (count * split,)
    run = partial(product.warmup, grid=grid) if compile_only else product[grid]
    zero = "none" if weight.zero is None else weight.grid
    early = weight.group > 0 and (launch.early or zero == "offset")
    run(
        x_TI,
        weight.codes_RPBW,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        x_TI if bias_O is None else bias_O,
        out_TO,
        parts,
        counters,
        tokens,
        rows,
        columns,
        turns,
        x_TI.stride(0),
        x_TI.stride(1),
        BIAS=bias_O is not None,
        EVEN=columns % tiles.COLUMNS == 0,
        EARLY=early,
        ROWS=height,
        TOKENS=launch.tokens,
        TURN=turn,
        SPLIT=split,
        STAGES=launch.stages,
        **later(x_TI.device),
        **_codes(weight, x_TI.dtype, x_TI.device, scaled=early),
        num_warps=launch.warps,
    )
    return out_TO


def apart(x_TI: Tensor) -> Tensor:
    """Inputs a copy of which is read where rows share memory, or columns lie too far apart.

    The accelerator of memory wants rows that are apart, and kernels count a row's in 32 bits.
    """
    tokens, columns = x_TI.shape
    shared = tokens > 1 and x_TI.stride(1) == 1 and x_TI.stride(0) < columns
    far = x_TI.stride(1) * columns >= 1 << 31
    return x_TI.contiguous() if shared or far else x_TI


@on_its_device
def dense(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """The weight's values (O, I)."""
    rows, columns = weight.features
    device = weight.codes_RPBW.device
    out_OI = torch.empty(rows, columns, dtype=dtype, device=device)
    blocks, pieces = weight.codes_RPBW.shape[:2]
    scaled = weight.group > 0
    if out_OI.numel():
        _dense[(pieces, blocks)](
            weight.codes_RPBW,
            weight.scale,
            weight.scale if weight.zero is None else weight.zero,
            out_OI,
            rows,
            columns,
            **_codes(weight, dtype, device, scaled=scaled),
        )
    return out_OI


@on_its_device
def pack_codes(codes_OI: Tensor, kind: Codes) -> Tensor:
    """As `tiles.pack_codes`, in one pass."""
    rows, columns = codes_OI.shape
    blocks = triton.cdiv(rows, tiles.ROWS)
    bits = BITS[kind]
    padded = triton.cdiv(columns, tiles.COLUMNS) * tiles.COLUMNS
    pieces = padded * bits // (16 * tiles.WORDS)
    shape = (blocks, pieces, tiles.ROWS, tiles.WORDS)
    packed_RPBW = torch.empty(shape, dtype=torch.int16, device=codes_OI.device)
    if packed_RPBW.numel():
        _pack[(pieces, blocks)](codes_OI, packed_RPBW, rows, columns, *codes_OI.stride(), bits)
    return packed_RPBW


def _codes(
    weight: Tiles, dtype: torch.dtype, device: torch.device, *, scaled: bool
) -> dict[str, object]:
    """What a kernel is compiled for, of codes and grid."""
    zero = "none" if weight.zero is None else weight.grid
    ptx = device.type in ("cuda", "meta") and torch.version.hip is None
    ptx = ptx and (dtype == torch.float16 or capability(device) >= (9, 0))
    return {
        "BITS": BITS[weight.kind],
        "FLOAT8": weight.kind == "float8",
        "GROUP": weight.group,
        "ZERO": zero,
        "EXCESS": excess(weight.kind, dtype),
        "PTX": unpacking(weight.kind, dtype, zero, scaled=scaled) if ptx else (),
    }


@triton.jit
def _dense(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    columns,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EXCESS: tl.constexpr,
    PTX: tl.constexpr,
):
    PARTS: tl.constexpr = 16 // BITS
    piece, block = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    inside, word = tl.arange(0, BLOCK), tl.arange(0, WORDS)
    codes_ptr += (block * tl.num_programs(0) + piece) * (BLOCK * WORDS)
    words = tl.load(codes_ptr + inside[:, None] * WORDS + word[None, :])
    row = block * BLOCK + inside
    out_ptr += row[:, None] * columns + word[None, :]
    for part in tl.static_range(PARTS):
        column = piece * (WORDS * PARTS) + part * WORDS
        scale = (
            tl.load(scale_ptr + row).to(tl.float32)
            if GROUP == 0
            else _of_group(
                scale_ptr, block, column, tl.num_programs(0) * (WORDS * PARTS), inside, GROUP
            )
        )
        zero = tl.zeros((BLOCK,), tl.float32)
        if ZERO != "none":
            zero = _of_group(
                zero_ptr, block, column, tl.num_programs(0) * (WORDS * PARTS), inside, GROUP
            )
        values = values_of(
            words, scale[:, None], zero[:, None], part, GROUP > 0, out_ptr.dtype.element_ty,
            BITS, FLOAT8, ZERO, EXCESS, PTX,
        )  # fmt: skip
        if GROUP == 0:
            values = (values.to(tl.float32) * scale[:, None]).to(values.dtype)
        there = (row < rows)[:, None] & (column + word < columns)[None, :]
        tl.store(out_ptr + column, values, mask=there)


@triton.jit
def _pack(codes_ptr, packed_ptr, rows, columns, codes_O, codes_I, BITS: tl.constexpr):
    PARTS: tl.constexpr = 16 // BITS
    piece, block = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    inside, word = tl.arange(0, BLOCK), tl.arange(0, WORDS)
    row = block * BLOCK + inside
    words = tl.zeros((BLOCK, WORDS), tl.int32)
    for part in tl.static_range(PARTS):
        column = piece * (WORDS * PARTS) + part * WORDS + word
        there = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * codes_O + column[None, :] * codes_I
        code = tl.load(codes_ptr + at, mask=there, other=0).to(tl.int32)
        code = tl.where(there, code + (8 if BITS == 4 else 0), 0)
        words |= (code & ((1 << BITS) - 1)) << (part * BITS)
    packed_ptr += (block * tl.num_programs(0) + piece) * (BLOCK * WORDS)
    tl.store(packed_ptr + inside[:, None] * WORDS + word[None, :], words.to(tl.int16))


@triton.jit
def _of_group(ptr, block, column, columns, inside, GROUP: tl.constexpr):
    number = block * (columns // GROUP) + column // GROUP
    if ptr.dtype.element_ty == tl.float32:
        return tl.load(ptr + number * BLOCK + inside)
    else:  # two groups side by side: a block of rows has an even number
        return tl.load(ptr + (number // 2 * BLOCK + inside) * 2 + number % 2).to(tl.float32)
