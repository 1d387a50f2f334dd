"""Rounding within Triton kernels, as torch rounds: by hand, since not every device has it.

Called from the kernels of several operators; see grids.py for the codes.
"""

import triton
import triton.language as tl


@triton.jit
def to_whole(x):
    """The nearest whole number, ties to even: adding 1.5 * 2**23 leaves no bits for less."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quotient(x, by, FUSED: tl.constexpr):
    """x / by of many x and one positive `by`, as IEEE rounds it.

    A device that fuses a product and a sum needs one division: with y = 1 / by, q = x y, then twice
    q + (x - q by) y, is the quotient rounded once (Markstein, "Computation of elementary functions
    on the IBM RISC System/6000 processor", IBM J. Res. Dev. 34, 1990, theorem 8.5 and what leads to
    it), since each remainder is exact. For that `by` must be far from the ends of float32, where
    remainders are lost, and so must the quotient be: below 2**-30 it is about right. No remainder
    tells of one that is 0 or infinite, which stays.
    """
    if FUSED:
        if (by > 8.673617379884035e-19) & (by < 1.152921504606847e18):  # 2**-60, 2**60
            inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), by)
            first = x * inverse
            near = tl.fma(tl.fma(-first, by, x), inverse, first)
            near = tl.fma(tl.fma(-near, by, x), inverse, near)
            near = tl.where((first == 0) | (tl.abs(first) == float("inf")), first, near)
        else:
            near = tl.math.div_rn(x, by)
    else:
        near = tl.math.div_rn(x, by)
    return near


@triton.jit
def to_float8(x, lowest, highest):
    """The nearest value in e4m3, ties to even, and its bits. NaN must have been put aside."""
    near = tl.minimum(tl.maximum(x, lowest), highest)
    size = tl.abs(near)
    bits = size.to(tl.int32, bitcast=True)
    bits += ((bits >> 20) & 1) + 0x7FFFF  # of 23 bits of mantissa, three stay
    normal = bits >> 20
    low = to_whole(size * 512.0)  # below 2**-6 all values are 2**-9 apart
    small = size < 0.015625
    code = tl.where(small, low.to(tl.int32), normal - (120 << 3))
    rounded = tl.where(small, low * 0.001953125, (normal << 20).to(tl.float32, bitcast=True))
    negative = x.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, code | 0x80, code), tl.where(negative, -rounded, rounded)
