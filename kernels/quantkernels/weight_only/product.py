"""The product's kernel: one tile of the weight after the other, by all warps of a program."""

import triton
import triton.language as tl

from quantkernels.dependent import wait
from quantkernels.weight_only import tiles
from quantkernels.weight_only.ending import finish
from quantkernels.weight_only.groups import groups_at, of_group, read_groups
from quantkernels.weight_only.values import joined, settled, values_of

BLOCK = tl.constexpr(tiles.ROWS)
WORDS = tl.constexpr(tiles.WORDS)


@triton.jit
def product(
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
    LATER: tl.constexpr,
):
    PARTS: tl.constexpr = 16 // BITS
    PIECE: tl.constexpr = WORDS * PARTS  # columns of a tile
    PIECES: tl.constexpr = TURN // PIECE
    GROUPS: tl.constexpr = TURN // GROUP if GROUP > 0 else 0
    scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
    zero_dtype: tl.constexpr = zero_ptr.dtype.element_ty
    SCALED: tl.constexpr = 32 // scale_dtype.primitive_bitwidth * GROUP  # columns, by one word
    ZEROED: tl.constexpr = 32 // zero_dtype.primitive_bitwidth * GROUP
    LATE: tl.constexpr = GROUP > 0 and not EARLY
    LONG: tl.constexpr = GROUP if LATE and GROUP < PIECE else PIECE
    WIDE: tl.constexpr = LONG if TOKENS > 16 else WORDS  # columns that are multiplied at once

    own = tl.program_id(0)
    count = tl.num_programs(0) // SPLIT
    tile, span = own // SPLIT, own % SPLIT
    first, last = turns * span // SPLIT, turns * (span + 1) // SPLIT
    across = tl.cdiv(tokens, TOKENS)
    top = tile // across * ROWS
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    asked = (token < tokens)[None, :]
    word, column = tl.arange(0, WORDS), tl.arange(0, WIDE)
    inside = top % BLOCK + tl.arange(0, ROWS)  # of this block of rows, or of the next
    start = tl.cast(top // BLOCK, tl.int64) * turns + first
    wait(LATER)
    block = inside // BLOCK * turns
    codes_ptr += start * (PIECES * BLOCK * WORDS)
    codes_ptr += (block * (PIECES * BLOCK * WORDS) + inside % BLOCK * WORDS)[:, None]
    codes_ptr += word[None, :]
    row_scale_ptr = scale_ptr + top + tl.arange(0, ROWS)
    scales_ptr = groups_at(scale_ptr, top, inside, turns, GROUPS)
    zeros_ptr = groups_at(zero_ptr, top, inside, turns, GROUPS)
    x_ptr += tl.cast(token, tl.int64)[None, :] * x_T + (first * TURN + column[:, None]) * x_I
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for turn in tl.range(first, last, num_stages=STAGES):
        for piece in tl.static_range(PIECES):
            words = tl.load(codes_ptr + piece * (BLOCK * WORDS))
            parts = ()
            for part in tl.static_range(PARTS):
                if GROUP == 0:
                    scale = tl.full((ROWS,), 1.0, tl.float32)
                    zero = tl.zeros((ROWS,), tl.float32)
                elif (piece * PIECE + part * WORDS) % GROUP == 0:
                    if (piece * PIECE + part * WORDS) % SCALED == 0:
                        scales = read_groups(
                            scales_ptr, turn, piece * PIECE + part * WORDS, GROUP, GROUPS
                        )
                    if ZERO != "none":
                        if (piece * PIECE + part * WORDS) % ZEROED == 0:
                            zeros = read_groups(
                                zeros_ptr, turn, piece * PIECE + part * WORDS, GROUP, GROUPS
                            )
                        zero = of_group(
                            zeros, turn, piece * PIECE + part * WORDS, zero_dtype, GROUP, GROUPS
                        )
                    else:
                        zero = tl.zeros((ROWS,), tl.float32)
                    scale = of_group(
                        scales, turn, piece * PIECE + part * WORDS, scale_dtype, GROUP, GROUPS
                    )
                    if LATE:
                        late = tl.zeros((ROWS, TOKENS), tl.float32)
                values = values_of(
                    words, scale[:, None], zero[:, None], part, EARLY, x_ptr.dtype.element_ty,
                    BITS, FLOAT8, ZERO, EXCESS, PTX,
                )  # fmt: skip
                parts = parts + (values,)
                if (part * WORDS + WORDS) % WIDE == 0:
                    at = x_ptr + (piece * PIECE + part * WORDS + WORDS - WIDE) * x_I
                    if EVEN:
                        x = tl.load(at, mask=asked, other=0.0)
                    else:
                        left = columns - turn * TURN - (piece * PIECE + part * WORDS + WORDS - WIDE)
                        x = tl.load(at, mask=asked & (column < left)[:, None], other=0.0)
                    if LATE:
                        late = settled(tl.dot(joined(parts), x, late), PTX)
                        if (piece * PIECE + part * WORDS + WORDS) % GROUP == 0:
                            sums += late * scale[:, None]
                    else:
                        sums = settled(tl.dot(joined(parts), x, sums), PTX)
                    parts = ()
        codes_ptr += PIECES * BLOCK * WORDS
        x_ptr += TURN * x_I

    row = top + tl.arange(0, ROWS)
    row_scale = tl.load(row_scale_ptr).to(tl.float32)[:, None] if GROUP == 0 else 1.0
    finish(
        out_ptr, bias_ptr, parts_ptr, arrivals_ptr, sums, row_scale, tile, span, count, row, token,
        rows, tokens, BIAS, ROWS, TOKENS, SPLIT, LATER,
    )  # fmt: skip
