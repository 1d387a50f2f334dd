"""The product by programs of equal shares: so many turns each, across the borders of tiles.

(Osama et al. 2023, https://arxiv.org/abs/2301.03598.) A program goes through its turns in one loop,
so that the next tile's codes are on their way while one tile ends. Of a tile that several programs
share, the last to come adds up the sums, in the order of the programs.
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
    first, last = _first(own, units, programs), _first(own + 1, units, programs)
    word = tl.arange(0, WORDS)
    inside = tl.arange(0, ROWS)
    within = tl.arange(0, TOKENS)
    block = inside // BLOCK * turns  # of this block of rows, or of the next
    code_of = (block * (PIECES * BLOCK * WORDS) + inside % BLOCK * WORDS)[:, None] + word[None, :]
    group_of = block * (GROUPS * BLOCK) + inside % BLOCK
    x_of = word[:, None] * x_I
    part_of = inside[:, None] * TOKENS + within[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for unit in tl.range(first, last, num_stages=STAGES):
        tile, turn = unit // turns, unit % turns
        top = tile // across * ROWS
        token = tile % across * TOKENS + within
        here = (token < tokens)[None, :]
        at = tl.cast(top // BLOCK, tl.int64) * turns + turn
        code_at = codes_ptr + at * (PIECES * BLOCK * WORDS) + top % BLOCK * WORDS + code_of
        scale_at = scale_ptr + at * (GROUPS * BLOCK) + top % BLOCK + group_of
        zero_at = zero_ptr + at * (GROUPS * BLOCK) + top % BLOCK + group_of
        x_at = x_ptr + turn * TURN * x_I + tl.cast(token, tl.int64)[None, :] * x_T + x_of
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
                        zero = tl.load(zero_at + (piece * PIECE + part * WORDS) // GROUP * BLOCK)
                    if LATE:
                        of_group = tl.zeros((ROWS, TOKENS), tl.float32)
                values = values_of(
                    words, scale[:, None], zero[:, None], part, EARLY, x_ptr.dtype.element_ty,
                    BITS, FLOAT8, ZERO, EXCESS, PTX,
                )  # fmt: skip
                x_part = x_at + (piece * PIECE + part * WORDS) * x_I
                if EVEN:
                    x = tl.load(x_part, mask=here, other=0.0)
                else:
                    left = columns - turn * TURN - (piece * PIECE + part * WORDS)
                    x = tl.load(x_part, mask=here & (word < left)[:, None], other=0.0)
                if LATE:
                    of_group = tl.dot(values, x, of_group)
                    if (piece * PIECE + part * WORDS + WORDS) % GROUP == 0:
                        sums += of_group * scale[:, None]
                else:
                    sums = tl.dot(values, x, sums)
        if turn == turns - 1 or unit == last - 1:
            row = top + inside
            held = here & (row < rows)[:, None]
            if unit - first >= turn and turn == turns - 1:
                row_scale = tl.load(scale_ptr + row)[:, None] if GROUP == 0 else 1.0
                store(out_ptr, bias_ptr, sums * row_scale, row, token, rows, held, BIAS)
            else:
                slot = tl.cast(2 * own + (unit - first >= turn).to(tl.int32), tl.int64)
                tl.store(parts_ptr + slot * (ROWS * TOKENS) + part_of, sums, mask=held)
            sums = tl.zeros((ROWS, TOKENS), tl.float32)
    if first % turns > 0 or last - first < turns:
        _arrive(
            out_ptr, bias_ptr, scale_ptr, parts_ptr, arrivals_ptr, first // turns, turns, units,
            programs, across, rows, tokens, BIAS, GROUP, ROWS, TOKENS,
        )  # fmt: skip
    if last % turns > 0 and first // turns < last // turns:
        _arrive(
            out_ptr, bias_ptr, scale_ptr, parts_ptr, arrivals_ptr, last // turns, turns, units,
            programs, across, rows, tokens, BIAS, GROUP, ROWS, TOKENS,
        )  # fmt: skip


@triton.jit
def _arrive(
    out_ptr,
    bias_ptr,
    scale_ptr,
    parts_ptr,
    arrivals_ptr,
    tile,
    turns,
    units,
    programs,
    across,
    rows,
    tokens,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Says that this program's sums of a shared tile are written; the last one adds all up."""
    tl.debug_barrier()  # they are, by all of its threads
    opener = _owner(tile * turns, units, programs)
    closer = _owner(tile * turns + turns - 1, units, programs)
    if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == closer - opener:
        tl.store(arrivals_ptr + tile, 0)
        row = tile // across * ROWS + tl.arange(0, ROWS)
        token = tile % across * TOKENS + tl.arange(0, TOKENS)
        held = (token < tokens)[None, :] & (row < rows)[:, None]
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        whole = tl.zeros((ROWS, TOKENS), tl.float32)
        for other in tl.range(opener, closer + 1, num_stages=1, loop_unroll_factor=1):
            slot = tl.cast(2 * other + (other == opener).to(tl.int32), tl.int64)
            of = parts_ptr + slot * (ROWS * TOKENS) + at
            whole += tl.load(of, mask=held, other=0.0, cache_modifier=".cg")
        row_scale = tl.load(scale_ptr + row)[:, None] if GROUP == 0 else 1.0
        store(out_ptr, bias_ptr, whole * row_scale, row, token, rows, held, BIAS)


@triton.jit
def _first(program, units, programs):
    """The first unit of a program's share."""
    return tl.cast(tl.cast(program, tl.int64) * units // programs, tl.int32)


@triton.jit
def _owner(unit, units, programs):
    """The program in whose share a unit is."""
    return tl.cast((tl.cast(unit + 1, tl.int64) * programs - 1) // units, tl.int32)
