"""How the product's kernel reads scales and zero points of groups: float32, or by twos in 16 bits.

What is on its way to a multiprocessor while others are multiplied is copied by four bytes or more
(Triton waits for smaller ones where they are read). So 16-bit values lie by twos, a row's of two
groups side by side, and are read as one word; where a turn has but one group, the next reads the
same word again, out of a cache. They are widened exactly.
"""

import triton
import triton.language as tl

from quantkernels.weight_only import tiles

BLOCK = tl.constexpr(tiles.ROWS)


@triton.jit
def groups_at(ptr, top, inside, turns, GROUPS: tl.constexpr):
    """Pointers to the first words of rows, `inside` the block of rows that `top` is in."""
    words = turns * GROUPS
    if ptr.dtype.element_ty != tl.float32:
        ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = words // 2
    ptr += tl.cast(top // BLOCK, tl.int64) * words * BLOCK
    return ptr + (inside // BLOCK * (words * BLOCK) + inside % BLOCK)


@triton.jit
def read_groups(ptr, turn, COLUMN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a turn's column, of the turn's so many, and in 16 bits its neighbour."""
    if ptr.dtype.element_ty == tl.float32:
        at = turn * GROUPS + COLUMN // GROUP
    elif GROUPS == 1:
        at = turn >> 1
    else:
        at = turn * (GROUPS // 2) + COLUMN // (2 * GROUP)
    return tl.load(ptr + at * BLOCK)


@triton.jit
def of_group(
    words,
    turn,
    COLUMN: tl.constexpr,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The group's own, float32."""
    if dtype == tl.float32:
        return words
    else:
        half = turn & 1 if GROUPS == 1 else COLUMN // GROUP % 2
        return (words >> (16 * half)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
