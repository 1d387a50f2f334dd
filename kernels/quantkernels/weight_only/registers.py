"""What the product for many tokens makes in registers, in Gluon: its left operand, of codes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkernels.weight_only import tiles

BLOCK = gl.constexpr(tiles.ROWS)


@gluon.jit
def of_groups(ptr, block, inside, turn, turns, wanted, GROUPS: gl.constexpr):
    """Each row's scales, or zero points, of a turn: so many groups, in 16 bits two to a word."""
    if GROUPS == 0:
        return ()
    WIDE: gl.constexpr = ptr.dtype.element_ty == gl.float32
    COUNT: gl.constexpr = GROUPS if WIDE else GROUPS // 2
    if not WIDE:
        ptr = gl.cast(ptr, gl.pointer_type(gl.int32), bitcast=True)
    ptr += (block * turns + turn) * (COUNT * BLOCK) + inside % BLOCK
    found = ()
    for at in gl.static_range(COUNT):
        found += (gl.load(ptr + at * BLOCK, mask=wanted, other=0),)
    return found


@gluon.jit
def halves_of(
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
    SCALED: gl.constexpr,
    ZEROED: gl.constexpr,
):
    """A turn's first, second, third or last 64 columns: two parts of a unit's words.

    Scales and zero points are kept as `SCALED` and `ZEROED`.
    """
    PART: gl.constexpr = 2 * (HALF % 2) if BITS == 4 else 0
    one = _part(
        words, scales, zeros, PART, 2 * HALF, dtype, GROUP, ZERO, EXCESS, PTX, SCALED, ZEROED
    )
    other = _part(
        words, scales, zeros, PART + 1, 2 * HALF + 1, dtype, GROUP, ZERO, EXCESS, PTX, SCALED,
        ZEROED,
    )  # fmt: skip
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
    SCALED: gl.constexpr,
    ZEROED: gl.constexpr,
):
    ptx: gl.constexpr = PTX[PART]
    args = [words]
    if GROUP > 0:
        OF: gl.constexpr = PLACE * 32 // GROUP
        if ZERO == "affine":
            args = args + [
                _wide(-(_group(zeros, OF, ZEROED).to(gl.float32) + EXCESS), words, dtype)
            ]
        args = args + [_wide(_group(scales, OF, SCALED), words, dtype)]
        if ZERO == "offset":
            args = args + [_wide(_group(zeros, OF, ZEROED), words, dtype)]
    operands: gl.constexpr = "=r" + ",r" * len(args)
    return gl.inline_asm_elementwise(ptx, operands, args, dtype.value, True, 2)


@gluon.jit
def _group(of_turn, OF: gl.constexpr, dtype: gl.constexpr):
    if dtype == gl.float32:
        return of_turn[OF]
    else:
        half = of_turn[OF // 2] >> (16 * (OF % 2))
        return half.to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def _wide(of_rows, like, dtype: gl.constexpr):
    wide, _ = gl.broadcast(gl.expand_dims(of_rows.to(dtype), 1), like)
    return wide
