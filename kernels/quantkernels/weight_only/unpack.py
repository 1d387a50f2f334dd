"""Codes to values in registers, two to an instruction: PTX for each kind of codes and dtype.

A 32-bit register holds two words of 16 bits; one part of both becomes two 16-bit floats at once. A
whole number is written into the mantissa of a float whose last bit counts one, and what that float
has too much is subtracted, which is exact (Kim et al. 2022, https://arxiv.org/abs/2211.10017,
section 3.3, do so for float16). float8's bits are moved to where the wider type has them, and the
difference of the exponents' biases is made good by a product with a power of two, exact as well.

Operands: $0 two values, $1 two words, then, each twice the same in the values' dtype: for "affine"
with a zero point what is added to the bits' own value, for scaled values the scale, and for
"offset" the zero point.
"""

from typing import NamedTuple

import torch

from quantkernels.launches import BITS, Codes


class _Dtype(NamedTuple):
    name: str  # of PTX
    whole: int  # a float whose last bit counts one, as bits
    minus: dict[Codes, int]  # what whole codes' floats have too much, negative, as bits
    float8: tuple[int, int, int]  # how far its bits move right, the mask there, the product


_DTYPES = {
    torch.bfloat16: _Dtype("bf16x2", 0x4300, {"int4": 0xC308}, (4, 0x07F0, 0x7B80)),
    torch.float16: _Dtype("f16x2", 0x6400, {"int4": 0xE408, "int8": 0xE480}, (1, 0x3F80, 0x5C00)),
}
_EXCESS = {0xC308: 136, 0xE408: 1032, 0xE480: 1152}
_AND_OR, _AND_XOR = 0xEA, 0x6A  # of lop3: (a & b) | c, (a & b) ^ c


def excess(codes: Codes, dtype: torch.dtype) -> int:
    """What the bits' own value has too much: with a zero point, that is left to the operand."""
    return _EXCESS.get(_DTYPES[dtype].minus.get(codes, 0), 0)


def unpacking(codes: Codes, dtype: torch.dtype, zero: str, *, scaled: bool) -> tuple[str, ...]:
    """A program for each part of a word; `zero` is "none", "affine" or "offset"."""
    facts = _DTYPES[dtype]
    ends = []
    if zero == "affine":
        ends += [f"add.rn.{facts.name} t, t, $2"]
    elif codes in facts.minus:
        ends += [f"mov.b32 u, {_two(facts.minus[codes])}", f"add.rn.{facts.name} t, t, u"]
    if zero == "offset":
        ends += [f"fma.rn.{facts.name} t, t, $2, $3"]
    elif scaled:
        ends += [f"mul.rn.{facts.name} t, t, {'$3' if zero == 'affine' else '$2'}"]
    return tuple(_block([*_parted(codes, dtype, part), *ends]) for part in range(16 // BITS[codes]))


def _parted(codes: Codes, dtype: torch.dtype, part: int) -> list[str]:
    facts = _DTYPES[dtype]
    if codes == "int4":
        return [_right(4 * part), f"lop3.b32 t, t, 0x000f000f, {_two(facts.whole)}, {_AND_OR}"]
    if codes == "int8" and dtype == torch.float16:
        return [_right(8 * part), f"lop3.b32 t, t, 0x00ff00ff, 0x64806480, {_AND_XOR}"]
    if codes == "int8":  # a mantissa of seven bits: 128 + the low seven, less 128 or, by sign, 256
        return [
            _right(8 * part),
            f"lop3.b32 u, t, 0x00800080, 0x43004300, {_AND_OR}",
            f"lop3.b32 t, t, 0x007f007f, 0x43004300, {_AND_OR}",
            "sub.rn.bf16x2 t, t, u",
        ]
    moved, mask, factor = facts.float8
    if part == 0:
        lines = ["shl.b32 u, $1, 8", f"shl.b32 t, $1, {8 - moved}"]
    else:
        lines = ["mov.b32 u, $1", f"shr.u32 t, $1, {moved}"]
    return [
        *lines,
        f"and.b32 t, t, {_two(mask)}",
        f"lop3.b32 t, u, 0x80008000, t, {_AND_OR}",
        f"mov.b32 u, {_two(factor)}",
        f"mul.rn.{facts.name} t, t, u",
    ]


def _block(lines: list[str]) -> str:
    return "{ .reg .b32 t, u; " + "".join(f"{line}; " for line in lines) + "mov.b32 $0, t; }"


def _right(bits: int) -> str:
    return f"shr.u32 t, $1, {bits}" if bits else "mov.b32 t, $1"


def _two(half: int) -> str:
    return f"0x{half:04x}{half:04x}"
