"""Rounding within Triton kernels, as torch rounds: by hand, since not every device has it.

Called from the kernels of several operators; see grids.py for the codes. What ends in `_ptx` is for
CUDA alone, by the instructions that newer GPUs have: e4m3's from 8.9 on. A thread must hold four
values or more.
"""

import triton
import triton.language as tl


@triton.jit
def to_whole(x):
    """The nearest whole number, ties to even: adding 1.5 * 2**23 leaves no bits for less."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quotient(x, by, FUSED: tl.constexpr, BOUNDED: tl.constexpr = False):
    """x / by of many x and one positive `by`, as IEEE rounds it.

    A device that fuses a product and a sum needs one division: with y = 1 / by, q = x y, then twice
    q + (x - q by) y, is the quotient rounded once (Markstein, "Computation of elementary functions
    on the IBM RISC System/6000 processor", IBM J. Res. Dev. 34, 1990, theorem 8.5 and what leads to
    it), since each remainder is exact. For that `by` must be far from the ends of float32, where
    remainders are lost: a power of two brings it there, and x with it. So must the quotient be:
    below 2**-30 it is about right, above 2**120 large. No remainder tells the sign of a 0, nor of a
    quotient that is infinite, which none is that is BOUNDED.
    """
    if FUSED:
        factor = tl.where(by < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2**-60, 2**64
        factor = tl.where(by > 1.152921504606847e18, 5.421010862427522e-20, factor)  # 2**60, 2**-64
        moved = x * factor
        inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), by * factor)
        by = tl.where(by == float("inf"), 0.0, by * factor)  # whose inverse is 0, as it should be
        first = moved * inverse
        near = tl.fma(tl.fma(first, -by, moved), inverse, first)
        near = tl.fma(tl.fma(near, -by, moved), inverse, near)
        if not BOUNDED:
            near = tl.where(tl.abs(first) == float("inf"), first, near)
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        near = (near.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
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


@triton.jit
def to_int8_ptx(x):
    """The nearest whole number, ties to even, within -128 and 127; NaN is 0. Four to a register."""
    return tl.inline_asm_elementwise(
        """{
        .reg .s32 a, b, c, d;
        cvt.rni.s32.f32 a, $1;
        cvt.rni.s32.f32 b, $2;
        cvt.rni.s32.f32 c, $3;
        cvt.rni.s32.f32 d, $4;
        cvt.pack.sat.s8.s32.b32 c, d, c, 0;
        cvt.pack.sat.s8.s32.b32 $0, b, a, c;
        }""",
        "=r,r,r,r,r",
        [x],
        tl.int8,
        True,
        4,
    )


@triton.jit
def to_float8_ptx(x):
    """The bits of the nearest value in e4m3, ties to even, within -448 and 448; NaN is 0x7F."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [x],
        tl.int8,
        True,
        4,
    )
