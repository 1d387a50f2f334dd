"""The product for a few tokens: warps side by side in the columns, each with tiles of its own.

DEEP tiles of the same rows are multiplied at once, a warp each, and their sums added up at the end,
within the program. So many warps read a weight of few rows, and none waits for another's sums.
"""

import triton
import triton.language as tl

from quantkernels.weight_only import tiles
from quantkernels.weight_only.ending import finish
from quantkernels.weight_only.values import values_of

BLOCK = tl.constexpr(tiles.ROWS)
WORDS = tl.constexpr(tiles.WORDS)


@triton.jit
def few(
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
    DEEP: tl.constexpr,
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
    steps = tl.cdiv(turns, DEEP)
    first, last = steps * span // SPLIT, steps * (span + 1) // SPLIT
    across = tl.cdiv(tokens, TOKENS)
    top = tile // across * ROWS
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[None, None, :]
    word, deep = tl.arange(0, WORDS), tl.arange(0, DEEP)
    inside = top % BLOCK + tl.arange(0, ROWS)  # of a block, which holds all of them
    turn = first * DEEP + deep
    start = tl.cast(top // BLOCK, tl.int64) * turns + turn
    codes_ptr += (start * (PIECES * BLOCK * WORDS))[:, None, None]
    codes_ptr += (inside * WORDS)[None, :, None] + word[None, None, :]
    row_scale_ptr = scale_ptr + top + tl.arange(0, ROWS)
    group_at = (start * (GROUPS * BLOCK))[:, None] + inside[None, :]
    scale_ptr += group_at
    zero_ptr += group_at
    column = (turn * TURN)[:, None, None] + word[None, :, None]
    x_ptr += tl.cast(token, tl.int64)[None, None, :] * x_T + column * x_I
    sums = tl.zeros((DEEP, ROWS, TOKENS), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        there = step * DEEP + deep < turns
        for piece in tl.static_range(PIECES):
            if EVEN:
                words = tl.load(codes_ptr + piece * (BLOCK * WORDS))
            else:
                at = codes_ptr + piece * (BLOCK * WORDS)
                words = tl.load(at, mask=there[:, None, None], other=0)
            for part in tl.static_range(PARTS):
                if GROUP == 0:
                    scale = tl.full((DEEP, ROWS), 1.0, tl.float32)
                    zero = tl.zeros((DEEP, ROWS), tl.float32)
                elif (piece * PIECE + part * WORDS) % GROUP == 0:
                    group = (piece * PIECE + part * WORDS) // GROUP * BLOCK
                    zero = tl.zeros((DEEP, ROWS), tl.float32)
                    if EVEN:
                        scale = tl.load(scale_ptr + group)
                        if ZERO != "none":
                            zero = tl.load(zero_ptr + group)
                    else:
                        scale = tl.load(scale_ptr + group, mask=there[:, None], other=0.0)
                        if ZERO != "none":
                            zero = tl.load(zero_ptr + group, mask=there[:, None], other=0.0)
                    if LATE:
                        of_group = tl.zeros((DEEP, ROWS, TOKENS), tl.float32)
                values = values_of(
                    words, scale[:, :, None], zero[:, :, None], part, EARLY,
                    x_ptr.dtype.element_ty, BITS, FLOAT8, ZERO, EXCESS, PTX,
                )  # fmt: skip
                at = x_ptr + (piece * PIECE + part * WORDS) * x_I
                if EVEN:
                    x = tl.load(at, mask=here, other=0.0)
                else:
                    left = columns - (step - first) * (DEEP * TURN) - (piece * PIECE + part * WORDS)
                    x = tl.load(at, mask=here & (column < left), other=0.0)
                if LATE:
                    of_group = tl.dot(values, x, of_group)
                    if (piece * PIECE + part * WORDS + WORDS) % GROUP == 0:
                        sums += of_group * scale[:, :, None]
                else:
                    sums = tl.dot(values, x, sums)
        codes_ptr += DEEP * PIECES * BLOCK * WORDS
        scale_ptr += DEEP * GROUPS * BLOCK
        zero_ptr += DEEP * GROUPS * BLOCK
        x_ptr += DEEP * TURN * x_I

    row = top + tl.arange(0, ROWS)
    row_scale = tl.load(row_scale_ptr)[:, None] if GROUP == 0 else 1.0
    whole = tl.sum(sums, axis=0)
    finish(
        out_ptr, bias_ptr, parts_ptr, arrivals_ptr, whole, row_scale, tile, span, count, row, token,
        rows, tokens, BIAS, ROWS, TOKENS, SPLIT,
    )  # fmt: skip
