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
