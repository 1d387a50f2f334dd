"""Codes and what they stand for, in plain torch: the grids that kernels know, as a table.

    affine   w = (q - zero) * scale    q whole, zero whole
    offset   w = q * scale + zero      q whole
    float8   w = q * scale             q in float8 e4m3

Codes are int8; of float8, its bits. All arguments broadcast; float32 maths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GridName = Literal["affine", "offset", "float8"]


@dataclass(frozen=True, slots=True)
class Rounded:
    codes: Tensor  # int8
    values: Tensor  # float32


def _affine(w: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int]) -> Rounded:
    code = (w / scale).round_().add_(zero).clamp_(*ends)
    return Rounded(code.to(torch.int8), code.sub_(zero).mul_(scale))


def _offset(w: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int]) -> Rounded:
    code = w.sub(zero).div_(scale).round_().clamp_(*ends)
    return Rounded(code.to(torch.int8), code.mul_(scale).add_(zero))


def _float8(w: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int]) -> Rounded:
    # torch's own cast makes NaN of what is too large
    code = (w / scale).clamp_(*ends).to(torch.float8_e4m3fn)
    return Rounded(code.view(torch.int8), code.float().mul_(scale))


ROUND: dict[GridName, Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Rounded]] = {
    "affine": _affine,
    "offset": _offset,
    "float8": _float8,
}


def nearest(
    grid: GridName, w: Tensor, scale: Tensor, zero: Tensor, ends: tuple[int, int]
) -> Tensor:
    """The code of the nearest value; `ends` are the least and the largest code."""
    return ROUND[grid](w, scale, zero, ends).codes


def values(grid: GridName, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if grid == "float8":
        return codes.view(torch.float8_e4m3fn).float() * scale
    if grid == "offset":
        return codes.float() * scale + zero
    return (codes.float() - zero.float()) * scale
