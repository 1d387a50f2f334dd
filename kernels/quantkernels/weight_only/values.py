"""Codes to values within a Triton kernel: by PTX, or in plain operations for others than CUDA."""

import triton
import triton.language as tl


@triton.jit
def values_of(
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
    """One part of each word: q, q - z or, scaled, what the code stands for, in the dtype.

    Scale and zero point are float32, of a shape that stretches to that of the words.
    """
    if len(PTX) == 0:
        return _plain_values(words, scale, zero, PART, SCALED, dtype, BITS, FLOAT8, ZERO)
    else:
        ptx: tl.constexpr = PTX[PART]
        args = [words]
        if ZERO == "affine":
            args = args + [tl.broadcast_to((-(zero + EXCESS)).to(dtype), words.shape)]
        if SCALED or ZERO == "offset":
            args = args + [tl.broadcast_to(scale.to(dtype), words.shape)]
        if ZERO == "offset":
            args = args + [tl.broadcast_to(zero.to(dtype), words.shape)]
        operands: tl.constexpr = "=r" + ",r" * len(args)
        return tl.inline_asm_elementwise(ptx, operands, args, dtype.value, True, 2)


@triton.jit
def joined(parts):
    """One, two or four parts of words side by side: registers are named anew, nothing moves."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        pairs = tl.join(parts[0], parts[1]).permute(0, 2, 1)
        return pairs.reshape(pairs.shape[0], 2 * pairs.shape[2])
    else:
        fours = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        fours = fours.permute(0, 2, 3, 1)
        return fours.reshape(fours.shape[0], 4 * fours.shape[3])


@triton.jit
def settled(sums, PTX: tl.constexpr):
    """The sums, which a matrix unit has finished.

    Without it Triton lets a loop's last product run into the next turn, where its left operand is
    made, and ptxas, which finds registers at risk, waits after each single instruction (C7515).
    """
    if len(PTX) == 0:
        return sums
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], tl.float32, True, 1)


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
        values -= zero
    if SCALED:
        values *= scale
    if ZERO == "offset":
        values += zero
    return values.to(dtype)
