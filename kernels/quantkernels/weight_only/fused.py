"""The weight-only product in Triton: tiles of codes become values in registers, and stay there.

A program owns some rows of the weight, some tokens and a span of the columns. The weight is the
left operand of its products, so that unpacked values never leave the registers; x is the right one.
A group's scale multiplies its sums in float32 ("late") or, where many tokens would make that dear,
its values in x's dtype before ("early"). Where a tile's columns are split into spans, every program
writes its float32 sums, and the last to come adds them up in the order of the spans: the same bits
in every run.

PTX is for CUDA; elsewhere the same is said in plain operations. Shapes may be any: rows and columns
are padded in the tiles, tokens and columns are masked.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.weight_only import tiles
from quantkernels.weight_only.arrivals import arrivals
from quantkernels.weight_only.configs import Config
from quantkernels.weight_only.tiles import Tiles
from quantkernels.weight_only.unpack import excess, unpacking

BLOCK = tl.constexpr(tiles.ROWS)
WORDS = tl.constexpr(tiles.WORDS)


def linear(
    x_TI: Tensor,
    weight: Tiles,
    bias_O: Tensor | None,
    config: Config,
    *,
    compile_only: bool = False,
) -> Tensor:
    tokens, columns = x_TI.shape
    rows = weight.features[0]
    out_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    height = program_rows(rows, config)
    count = triton.cdiv(rows, height) * triton.cdiv(tokens, config.tokens)
    turns = triton.cdiv(columns, tiles.COLUMNS) * (tiles.COLUMNS // config.turn)
    split = min(config.split, turns)
    parts = out_TO
    if split > 1:
        parts = torch.empty(split, count, height, config.tokens, device=x_TI.device)
    grid = (count * split,)
    run = partial(_linear.warmup, grid=grid) if compile_only else _linear[grid]
    zero = "none" if weight.zero is None else weight.grid
    early = weight.group > 0 and (config.early or zero == "offset")
    run(
        x_TI,
        weight.codes_RPBW,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        x_TI if bias_O is None else bias_O,
        out_TO,
        parts,
        arrivals(x_TI.device, count if split > 1 else 0),
        tokens,
        rows,
        columns,
        turns,
        x_TI.stride(0),
        x_TI.stride(1),
        bias_O is not None,
        columns % tiles.COLUMNS == 0,
        early,
        height,
        config.tokens,
        split,
        config.turn,
        config.stages,
        **_codes(weight, x_TI.dtype, x_TI.device, scaled=early),
        num_warps=config.warps,
    )
    return out_TO


def program_rows(rows: int, config: Config) -> int:
    """As the launch has them, or those of a tile where more would pass the last one."""
    padded = triton.cdiv(rows, tiles.ROWS) * tiles.ROWS
    return config.rows if padded % config.rows == 0 else tiles.ROWS


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


def _codes(
    weight: Tiles, dtype: torch.dtype, device: torch.device, *, scaled: bool
) -> dict[str, object]:
    """What a kernel is compiled for, of codes and grid."""
    zero = "none" if weight.zero is None else weight.grid
    ptx = device.type in ("cuda", "meta") and torch.version.hip is None
    return {
        "BITS": tiles.BITS[weight.kind],
        "FLOAT8": weight.kind == "float8",
        "GROUP": weight.group,
        "ZERO": zero,
        "EXCESS": excess(weight.kind, dtype),
        "PTX": unpacking(weight.kind, dtype, zero, scaled=scaled) if ptx else (),
    }


@triton.jit
def _linear(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    tokens,
    rows,
    columns,
    turns,
    x_T,
    x_I,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    TURN: tl.constexpr,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EXCESS: tl.constexpr,
    PTX: tl.constexpr,
):
    PARTS: tl.constexpr = 16 // BITS
    PIECE: tl.constexpr = WORDS * PARTS  # columns of a tile
    PIECES: tl.constexpr = TURN // PIECE
    GROUPS: tl.constexpr = TURN // GROUP if GROUP > 0 else 0
    LATE: tl.constexpr = GROUP > 0 and not EARLY

    own = tl.program_id(0)
    count = tl.num_programs(0) // SPLIT
    tile, span = own // SPLIT, own % SPLIT
    first, last = turns * span // SPLIT, turns * (span + 1) // SPLIT
    across = tl.cdiv(tokens, TOKENS)
    top = tile // across * ROWS
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[None, :]
    word = tl.arange(0, WORDS)
    inside = top % BLOCK + tl.arange(0, ROWS)  # of this block of rows, or of the next
    start = tl.cast(top // BLOCK, tl.int64) * turns + first
    block = inside // BLOCK * turns
    codes_ptr += start * (PIECES * BLOCK * WORDS)
    codes_ptr += (block * (PIECES * BLOCK * WORDS) + inside % BLOCK * WORDS)[:, None]
    codes_ptr += word[None, :]
    row_scale_ptr = scale_ptr + top + tl.arange(0, ROWS)
    group_at = start * (GROUPS * BLOCK) + block * (GROUPS * BLOCK) + inside % BLOCK
    scale_ptr += group_at
    zero_ptr += group_at
    x_ptr += tl.cast(token, tl.int64)[None, :] * x_T + (first * TURN + word[:, None]) * x_I
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for turn in tl.range(first, last, num_stages=STAGES):
        for piece in tl.static_range(PIECES):
            words = tl.load(codes_ptr + piece * (BLOCK * WORDS))
            for part in tl.static_range(PARTS):
                if GROUP == 0:
                    scale = tl.full((ROWS,), 1.0, tl.float32)
                    zero = tl.zeros((ROWS,), tl.float32)
                elif (piece * PIECE + part * WORDS) % GROUP == 0:
                    scale = tl.load(scale_ptr + (piece * PIECE + part * WORDS) // GROUP * BLOCK)
                    zero = tl.zeros((ROWS,), tl.float32)
                    if ZERO != "none":
                        zero = tl.load(zero_ptr + (piece * PIECE + part * WORDS) // GROUP * BLOCK)
                    if LATE:
                        of_group = tl.zeros((ROWS, TOKENS), tl.float32)
                values = _values(
                    words, scale, zero, part, EARLY, x_ptr.dtype.element_ty,
                    BITS, FLOAT8, ZERO, EXCESS, PTX,
                )  # fmt: skip
                at = x_ptr + (piece * PIECE + part * WORDS) * x_I
                if EVEN:
                    x = tl.load(at, mask=here, other=0.0)
                else:
                    left = columns - turn * TURN - (piece * PIECE + part * WORDS)
                    x = tl.load(at, mask=here & (word < left)[:, None], other=0.0)
                if LATE:
                    of_group = tl.dot(values, x, of_group)
                    if (piece * PIECE + part * WORDS + WORDS) % GROUP == 0:
                        sums += of_group * scale[:, None]
                else:
                    sums = tl.dot(values, x, sums)
        codes_ptr += PIECES * BLOCK * WORDS
        scale_ptr += GROUPS * BLOCK
        zero_ptr += GROUPS * BLOCK
        x_ptr += TURN * x_I

    row = top + tl.arange(0, ROWS)
    held = here & (row < rows)[:, None]
    row_scale = tl.load(row_scale_ptr)[:, None] if GROUP == 0 else 1.0
    if SPLIT == 1:
        _store(out_ptr, bias_ptr, sums * row_scale, row, token, rows, held, BIAS)
    else:
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        parts_ptr += tl.cast(tile, tl.int64) * (ROWS * TOKENS)
        stride = tl.cast(count, tl.int64) * (ROWS * TOKENS)
        tl.store(parts_ptr + span * stride + at, sums, mask=held)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals_ptr + tile, 0)
            whole = tl.zeros((ROWS, TOKENS), tl.float32)
            for other in tl.static_range(SPLIT):
                of = parts_ptr + other * stride + at
                whole += tl.load(of, mask=held, other=0.0, cache_modifier=".cg")
            _store(out_ptr, bias_ptr, whole * row_scale, row, token, rows, held, BIAS)


@triton.jit
def _store(out_ptr, bias_ptr, sums, row, token, rows, held, BIAS: tl.constexpr):
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = tl.cast(token, tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=held)


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
            tl.load(scale_ptr + row)
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
        values = _values(
            words, scale, zero, part, GROUP > 0, out_ptr.dtype.element_ty,
            BITS, FLOAT8, ZERO, EXCESS, PTX,
        )  # fmt: skip
        if GROUP == 0:
            values = (values.to(tl.float32) * scale[:, None]).to(values.dtype)
        there = (row < rows)[:, None] & (column + word < columns)[None, :]
        tl.store(out_ptr + column, values, mask=there)


@triton.jit
def _of_group(ptr, block, column, columns, inside, GROUP: tl.constexpr):
    return tl.load(ptr + (block * (columns // GROUP) + column // GROUP) * BLOCK + inside)


@triton.jit
def _values(
    words,
    scale,
    zero,
    PART: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    ZERO: tl.constexpr,
    EXCESS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One part of each word: q, q - z or, scaled, what the code stands for, in the dtype."""
    if len(PTX) == 0:
        return _plain_values(words, scale, zero, PART, SCALED, dtype, BITS, FLOAT8, ZERO)
    else:
        ptx: tl.constexpr = PTX[PART]
        args = [words]
        if ZERO == "affine":
            args = args + [tl.broadcast_to(-(zero + EXCESS)[:, None], words.shape)]
        if SCALED or ZERO == "offset":
            args = args + [tl.broadcast_to(scale[:, None], words.shape)]
        if ZERO == "offset":
            args = args + [tl.broadcast_to(zero[:, None], words.shape)]
        operands: tl.constexpr = "=r,r" + ",r,r" * (len(args) - 1)
        return tl.inline_asm_elementwise(ptx, operands, args, dtype.value, True, 2)


@triton.jit
def _plain_values(
    words,
    scale,
    zero,
    PART: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    ZERO: tl.constexpr,
):
    bits = (words.to(tl.int32) >> (PART * BITS)) & ((1 << BITS) - 1)
    if FLOAT8:  # as float16, whose exponent's bias is larger by 8
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        values = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif BITS == 4:
        values = (bits - 8).to(tl.float32)
    else:
        values = ((bits ^ 128) - 128).to(tl.float32)
    if ZERO == "affine":
        values -= zero[:, None]
    if SCALED:
        values *= scale[:, None]
    if ZERO == "offset":
        values += zero[:, None]
    return values.to(dtype)
