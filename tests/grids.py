"""Grids of quantcore/primitives.py that tests go through."""

import torch

from quantcore.primitives import AffineGrid

# half a unit in the last place, relative: what one rounding may do
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
INPUTS = (torch.float32, torch.float16, torch.bfloat16)
RANGES = [
    (torch.int8, None, None),
    (torch.uint8, None, None),
    (torch.int16, None, None),
    (torch.int32, None, None),
    (torch.int8, -127, 127),
    (torch.int8, -8, 7),
    (torch.int8, -7, 7),
    (torch.uint8, 0, 15),
    (torch.int32, 0, 15),
    (torch.uint8, 0, 6),
    (torch.int8, -2, 1),
]
KINDS = [
    ("symmetric", "int"),
    ("symmetric", "none"),
    ("symmetric_no_clipping_err", "int"),
    ("symmetric_no_clipping_err", "none"),
    ("asymmetric", "int"),
    ("asymmetric", "float"),
]
GRIDS = [
    AffineGrid(dtype=dtype, quant_min=low, quant_max=high, mapping=mapping, zero_point_domain=zero)
    for dtype, low, high in RANGES
    for mapping, zero in KINDS
    if not (zero == "none" and (dtype is torch.uint8 or low == 0))
    # a float16 zero in the middle of 2**16 steps would carry too few bits for one of them
    and not (zero == "float" and dtype in (torch.int16, torch.int32) and low is None)
]
FLOAT8_GRIDS = [
    AffineGrid(dtype=dtype, zero_point_domain="none")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
]
INT8 = AffineGrid(dtype=torch.int8)


def label(grid: AffineGrid) -> str:
    low, high = grid.limits
    return f"{grid.dtype}[{low},{high}]-{grid.mapping}-{grid.zero_point_domain}"[6:]
