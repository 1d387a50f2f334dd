"""Affine quantization by blocks: from a tensor to codes and back, in any granularity.

These are the field's general operators, with torchao 0.18's conventions, for any range of integer
codes and for float8. Jobs solve with affine.py instead: the one grid of weights that
compressed-tensors and llm-compressor have, in float32, its scale rounded before any weight is.

By the domain of its zero point z, a value x has the code q, clamped to the grid's ends, and
reads back as

    "int"    q = round(x / s) + z                (q - z) * s
    "none"   q = round(x / s); float8: x / s     q * s
    "float"  q = round((x - z) / s + middle)     (q - middle) * s + z

("int": Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 2.1; "float" is what tinygemm's
4-bit kernels read.) A block is block_size[d] long in dimension d: the tensor's own shape makes one
block of all, (1, width) a block per row, (1, 128) groups, (1, 1, width) tokens, (128, 128) tiles.

Arithmetic stays in the dtypes of x and of the scale, and x / s is x * (1 / s) in "int" and "none",
as in torchao: on a CPU results agree to the bit. So a bfloat16 x or scale can put an 8-bit code one
or two beside the nearest; x.float() with a float32 scale does not. We differ where torchao breaks:
- a dtype that cannot hold all codes gives way to a finer one (there the largest code wraps);
- no scale is 0, nor so small that 1 / s is infinite (there codes come from NaN);
- "symmetric_no_clipping_err" measures from the grid's zero (there unsigned codes are clipped),
  and "float" zero points from its least code (there signed codes are clipped);
- blocks of one number each are blocks (there one block of all).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# How a block's range is laid over the codes. Symmetric: the largest magnitude spans half of the
# steps, so a positive one may round half a step inwards. Without clipping error: each side is
# divided by the codes on its side, and the larger quotient is the scale of both.
Mapping = Literal["symmetric", "symmetric_no_clipping_err", "asymmetric"]
ZeroPointDomain = Literal["none", "int", "float"]

_MAPPINGS = ("symmetric", "symmetric_no_clipping_err", "asymmetric")
_DOMAINS = ("none", "int", "float")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineGrid:
    """The codes there are, and how values are laid over them."""

    dtype: torch.dtype  # of the codes: uint8, int8, int16, int32, float8_e4m3fn or float8_e5m2
    quant_min: int | None = None  # None: the dtype's own; 0 and 15 are 4 bits held in a byte
    quant_max: int | None = None
    mapping: Mapping = "symmetric"
    zero_point_domain: ZeroPointDomain = "int"

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, (*_INTEGERS, *_FLOAT8S))
        _one_of("mapping", self.mapping, _MAPPINGS)
        _one_of("zero_point_domain", self.zero_point_domain, _DOMAINS)
        symmetric = self.mapping != "asymmetric"
        low, high = self.limits
        own = _numbers(self.dtype)
        if not own.min <= low < high <= own.max:
            raise ValueError(
                f"quant_min, quant_max: {low} to {high} is no range of {self.dtype}; "
                f"write a lower and a higher code from {own.min} to {own.max}"
            )
        if self.is_float8 and (symmetric, self.zero_point_domain) != (True, "none"):
            raise ValueError(
                f"zero_point_domain: {self.dtype} has no zero point; "
                "write 'none', and 'symmetric' for the mapping"
            )
        if self.zero_point_domain == "float" and symmetric:
            raise ValueError(f"mapping: {self.mapping!r} has no 'float' zero; write 'asymmetric'")
        if self.zero_point_domain == "none" and not (symmetric and self.zero == 0):
            raise ValueError(
                f"zero_point_domain: {self.mapping!r} codes from {low} to {high} need a zero; "
                "write 'int', or a symmetric mapping and a range around 0"
            )
        if self.mapping == "symmetric_no_clipping_err" and not low < self.zero < high:
            raise ValueError(
                f"mapping: {self.mapping!r} needs codes on either side of zero, and {low} to "
                f"{high} has not; write 'symmetric' or a wider range"
            )

    @property
    def is_float8(self) -> bool:
        return self.dtype in _FLOAT8S

    @property
    def limits(self) -> tuple[float, float]:
        own = _numbers(self.dtype)
        low = own.min if self.quant_min is None else self.quant_min
        return low, own.max if self.quant_max is None else self.quant_max

    @property
    def middle(self) -> float:
        """The code, or half code, that reads back as a "float" zero point."""
        return (sum(self.limits) + 1) / 2

    @property
    def zero(self) -> int:
        """The code that reads back as 0 where the mapping is symmetric."""
        return int(self.middle)


@dataclass(frozen=True, slots=True)
class AffineQparams:
    """One entry per block, at the block's place: x.shape[d] / block_size[d] in dimension d."""

    scale: Tensor
    zero_point: Tensor | None  # None in the domain "none"


@torch.no_grad()
def choose_qparams_affine(
    x: Tensor,
    block_size: tuple[int, ...],
    grid: AffineGrid,
    *,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
) -> AffineQparams:
    """Scale and zero point of every block of x, from its extremes; but in "float", 0 stays 0.

    x is finite: float32, bfloat16, float16 or float64, of any shape and strides. No scale is below
    `eps`: by default x's least normal number, for float8 its least number. Scales are stored in
    x's dtype (float8: in float32), zero points as int32 ("float": in x's dtype).
    A float16 block whose range exceeds 65,504 has no finite scale: hand in x.float().
    Raises ValueError, as the other two do, with the argument's name and what to write instead.
    """
    _one_of("x.dtype", x.dtype, _FLOATS)
    scale_dtype = scale_dtype or (torch.float32 if grid.is_float8 else x.dtype)
    _one_of("scale_dtype", scale_dtype, _FLOATS)
    work = _holding_codes(x.dtype, grid)
    normal = torch.finfo(work).smallest_normal
    least_positive = normal * torch.finfo(work).eps
    if eps is None:
        eps = least_positive if grid.is_float8 else normal
    elif eps < least_positive:
        raise ValueError(f"eps: {eps} is 0 in {work}; write {least_positive:.3g} or more")

    blocks = _split(x, block_size)
    within = tuple(range(1, blocks.dim(), 2))
    low, high = blocks.amin(within).to(work), blocks.amax(within).to(work)
    if grid.zero_point_domain != "float":
        low, high = low.clamp(max=0), high.clamp(min=0)

    quant_min, quant_max = grid.limits
    steps = quant_max - quant_min
    if grid.mapping == "asymmetric":
        scale = (high - low) / steps
    elif grid.mapping == "symmetric":
        scale = torch.maximum(-low, high) / (steps / 2)
    else:
        scale = torch.maximum(low / (quant_min - grid.zero), high / (quant_max - grid.zero))
    scale = scale.clamp(min=max(eps, 2 / torch.finfo(scale_dtype).max))  # 1 / scale is finite

    stored = scale.to(scale_dtype)
    if grid.zero_point_domain == "none":
        return AffineQparams(stored, None)
    zero_dtype = _zero_point_dtype(zero_point_dtype, x.dtype, grid)
    if grid.zero_point_domain == "float":
        return AffineQparams(stored, (low + scale * (grid.middle - quant_min)).to(zero_dtype))
    if grid.mapping == "asymmetric":
        zero = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
        return AffineQparams(stored, zero.to(zero_dtype))
    return AffineQparams(stored, torch.full_like(stored, grid.zero, dtype=zero_dtype))


@torch.no_grad()
def quantize_affine(
    x: Tensor, block_size: tuple[int, ...], qparams: AffineQparams, grid: AffineGrid
) -> Tensor:
    """The code of every value of x, in the grid's dtype and x's shape."""
    _one_of("x.dtype", x.dtype, _FLOATS)
    scale, zero = _spread(qparams, x.shape, block_size, grid)
    blocks = _split(x, block_size).to(_holding_codes(x.dtype, grid))
    scale = scale.to(_holding_codes(scale.dtype, grid))
    if grid.is_float8:
        codes = blocks.float() / scale
    elif zero is None:
        codes = (blocks * (1.0 / scale)).round()
    elif grid.zero_point_domain == "int":
        codes = (blocks * (1.0 / scale)).round() + zero
    else:
        codes = ((blocks - (zero - scale * grid.middle)) / scale).round()
    return codes.clamp(*grid.limits).to(grid.dtype).reshape(x.shape)


def dequantize_affine(
    codes: Tensor,
    block_size: tuple[int, ...],
    qparams: AffineQparams,
    grid: AffineGrid,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values that codes stand for, in `output_dtype` and the codes' shape."""
    _one_of("codes.dtype", codes.dtype, (grid.dtype,))
    _one_of("output_dtype", output_dtype, _FLOATS)
    scale, zero = _spread(qparams, codes.shape, block_size, grid)
    work = torch.float32 if grid.is_float8 else _holding_codes(output_dtype, grid)
    blocks = _split(codes, block_size).to(work)
    if zero is None:
        values = blocks * scale
    elif grid.zero_point_domain == "int":
        values = (blocks - zero.to(work)) * scale
    else:  # in place: every step is rounded to the output's dtype, whatever the scale's
        values = (blocks - grid.middle).mul_(scale).add_(zero)
    return values.to(output_dtype).reshape(codes.shape)


def _split(t: Tensor, block_size: tuple[int, ...]) -> Tensor:
    """`t` with each dimension as two: which block, and where in it."""
    counts = _counts(t.shape, block_size)
    return t.reshape([n for pair in zip(counts, block_size, strict=True) for n in pair])


def _counts(shape: torch.Size, block_size: tuple[int, ...]) -> list[int]:
    """How many blocks there are along each dimension."""
    if len(block_size) != len(shape):
        raise ValueError(
            f"block_size: {block_size} has {len(block_size)} entries; "
            f"write one for each dimension of {tuple(shape)}"
        )
    for extent, size in zip(shape, block_size, strict=True):
        if size < 1:
            raise ValueError(f"block_size: {block_size} makes empty blocks; write 1 or more")
        if extent % size:
            raise ValueError(
                f"block_size: {size} of {block_size} does not divide {extent} of {tuple(shape)}; "
                f"write a divisor of {extent}"
            )
    return [extent // size for extent, size in zip(shape, block_size, strict=True)]


def _spread(
    qparams: AffineQparams, shape: torch.Size, block_size: tuple[int, ...], grid: AffineGrid
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with a dimension of 1 for the inside of blocks, as `_split` has it."""
    zero = qparams.zero_point
    if (zero is None) != (grid.zero_point_domain == "none"):
        wanted = "None" if zero is not None else "a tensor like the scale"
        raise ValueError(
            f"qparams.zero_point: write {wanted}, the grid's domain is {grid.zero_point_domain!r}"
        )
    counts = _counts(shape, block_size)
    for name, per_block in (("scale", qparams.scale), ("zero_point", zero)):
        if per_block is not None and list(per_block.shape) != counts:
            raise ValueError(
                f"qparams.{name}: has the shape {tuple(per_block.shape)}; "
                f"write one entry per block, {tuple(counts)}"
            )
    spread = [n for count in counts for n in (count, 1)]
    return qparams.scale.reshape(spread), None if zero is None else zero.reshape(spread)


def _holding_codes(dtype: torch.dtype, grid: AffineGrid) -> torch.dtype:
    """`dtype`, or the next finer one that holds all codes, and their differences, exactly."""
    if grid.is_float8:
        return dtype
    low, high = grid.limits
    largest = max(abs(low), abs(high), high - low)
    finer = (dtype, torch.float32, torch.float64)
    return next(held for held in finer if largest < 2 / torch.finfo(held).eps)


def _zero_point_dtype(
    asked: torch.dtype | None, x_dtype: torch.dtype, grid: AffineGrid
) -> torch.dtype:
    if grid.zero_point_domain == "float":
        _one_of("zero_point_dtype", asked or x_dtype, _FLOATS)
        return asked or x_dtype
    asked = asked or torch.int32
    _one_of("zero_point_dtype", asked, _INTEGERS)
    low, high = grid.limits
    if low < torch.iinfo(asked).min or high > torch.iinfo(asked).max:
        raise ValueError(f"zero_point_dtype: {asked} lacks some of {low} to {high}; write int32")
    return asked


def _numbers(dtype: torch.dtype) -> torch.finfo | torch.iinfo:
    return torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value} is not taken; write {' or '.join(map(str, allowed))}")
