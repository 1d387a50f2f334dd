"""The product by programs of equal shares: so many turns each, across the borders of tiles.

(Osama et al. 2023, https://arxiv.org/abs/2301.03598.) Of a tile that several programs share, the
last to come adds up the sums, in the order of the programs.
"""

import triton
import triton.language as tl

from quantkernels.weight_only import tiles
from quantkernels.weight_only.ending import store
from quantkernels.weight_only.values import values_of

BLOCK = tl.constexpr(tiles.ROWS)
WORDS = tl.constexpr(tiles.WORDS)


@triton.jit
def even(
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
    count,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
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

    own, programs = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(tokens, TOKENS)
    units = count * turns
    unit, end = _first(own, units, programs), _first(own + 1, units, programs)
    word = tl.arange(0, WORDS)
    while unit < end:
        tile, first = unit // turns, unit % turns
        last = min(turns, first + end - unit)
        top = tile // across * ROWS
        token = tile % across * TOKENS + tl.arange(0, TOKENS)
        here = (token < tokens)[None, :]
        inside = top % BLOCK + tl.arange(0, ROWS)  # of this block of rows, or of the next
        start = tl.cast(top // BLOCK, tl.int64) * turns + first
        block = inside // BLOCK * turns
        code_at = codes_ptr + start * (PIECES * BLOCK * WORDS)
        code_at += (block * (PIECES * BLOCK * WORDS) + inside % BLOCK * WORDS)[:, None]
        code_at += word[None, :]
        group_at = start * (GROUPS * BLOCK) + block * (GROUPS * BLOCK) + inside % BLOCK
        scale_at, zero_at = scale_ptr + group_at, zero_ptr + group_at
        x_at = (
            x_ptr + tl.cast(token, tl.int64)[None, :] * x_T + (first * TURN + word[:, None]) * x_I
        )
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
        for turn in tl.range(first, last, num_stages=STAGES):
            for piece in tl.static_range(PIECES):
                words = tl.load(code_at + piece * (BLOCK * WORDS))
                for part in tl.static_range(PARTS):
                    if GROUP == 0:
                        scale = tl.full((ROWS,), 1.0, tl.float32)
                        zero = tl.zeros((ROWS,), tl.float32)
                    elif (piece * PIECE + part * WORDS) % GROUP == 0:
                        scale = tl.load(scale_at + (piece * PIECE + part * WORDS) // GROUP * BLOCK)
                        zero = tl.zeros((ROWS,), tl.float32)
                        if ZERO != "none":
                            zero = tl.load(
                                zero_at + (piece * PIECE + part * WORDS) // GROUP * BLOCK
                            )
                        if LATE:
                            of_group = tl.zeros((ROWS, TOKENS), tl.float32)
                    values = values_of(
                        words, scale[:, None], zero[:, None], part, EARLY, x_ptr.dtype.element_ty,
                        BITS, FLOAT8, ZERO, EXCESS, PTX,
                    )  # fmt: skip
                    at = x_at + (piece * PIECE + part * WORDS) * x_I
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
            code_at += PIECES * BLOCK * WORDS
            scale_at += GROUPS * BLOCK
            zero_at += GROUPS * BLOCK
            x_at += TURN * x_I

        row = top + tl.arange(0, ROWS)
        held = here & (row < rows)[:, None]
        row_scale = tl.load(scale_ptr + row)[:, None] if GROUP == 0 else 1.0
        if last - first == turns:
            store(out_ptr, bias_ptr, sums * row_scale, row, token, rows, held, BIAS)
        else:
            at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
            slot = tl.cast(2 * own + (first == 0).to(tl.int32), tl.int64)
            tl.store(parts_ptr + slot * (ROWS * TOKENS) + at, sums, mask=held)
            tl.debug_barrier()  # all of this program's sums are written before it says so
            opener = _owner(tile * turns, units, programs)
            closer = _owner(tile * turns + turns - 1, units, programs)
            if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == closer - opener:
                tl.store(arrivals_ptr + tile, 0)
                whole = tl.zeros((ROWS, TOKENS), tl.float32)
                for other in tl.range(opener, closer + 1, num_stages=1, loop_unroll_factor=1):
                    slot = tl.cast(2 * other + (other == opener).to(tl.int32), tl.int64)
                    of = parts_ptr + slot * (ROWS * TOKENS) + at
                    whole += tl.load(of, mask=held, other=0.0, cache_modifier=".cg")
                store(out_ptr, bias_ptr, whole * row_scale, row, token, rows, held, BIAS)
        unit += last - first


@triton.jit
def _first(program, units, programs):
    """The first unit of a program's share."""
    return tl.cast(tl.cast(program, tl.int64) * units // programs, tl.int32)


@triton.jit
def _owner(unit, units, programs):
    """The program in whose share a unit is."""
    return tl.cast((tl.cast(unit + 1, tl.int64) * programs - 1) // units, tl.int32)
