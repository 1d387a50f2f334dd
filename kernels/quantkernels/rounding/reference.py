"""Activations rounded to codes, in plain torch.

Of a row with extremes l and h, on a grid from qmin to qmax:

    symmetric         scale = 2 max(-l, h) / (qmax - qmin)            zero = 0
    with a zero point scale = (max(h, 0) - min(l, 0)) / (qmax - qmin) zero = [qmin - min(l, 0) / scale]
    code = [x / scale] + zero, held to the grid; a scale of 0 counts as 1

where [] rounds ties to even. All is float32, each operation rounded once; nothing is multiplied by
a reciprocal, as torch does on a GPU where it divides by a number.
"""  # noqa: E501 - a formula

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkernels.forward import reference as forward
from quantkernels.grids import GridName, nearest, values


@dataclass(frozen=True, slots=True)
class InputGrid:
    name: GridName
    qmin: int  # the least and the largest value of a code
    qmax: int
    symmetric: bool = True  # else with a zero point, a whole code

    @property
    def fields(self) -> tuple[GridName, int, int, bool]:
        return self.name, self.qmin, self.qmax, self.symmetric

    @property
    def ends(self) -> tuple[int, int]:
        return self.qmin, self.qmax


def by_token(x_TI: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    wide_TI = x_TI.float()
    scale_T1, zero_T1 = _range(wide_TI.amin(-1, True), wide_TI.amax(-1, True), grid)
    return nearest(grid.name, wide_TI, scale_T1, zero_T1, grid.ends), scale_T1, zero_T1


def rounded_by_token(x_TI: Tensor, grid: InputGrid) -> Tensor:
    codes_TI, scale_T1, zero_T1 = by_token(x_TI, grid)
    return values(grid.name, codes_TI, scale_T1, zero_T1).to(x_TI.dtype)


def by_tensor(x_TI: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    wide_TI = x_TI.float()
    if x_TI.numel():
        scale, zero = _range(wide_TI.amin(), wide_TI.amax(), grid)
    else:
        scale, zero = wide_TI.new_ones(()), wide_TI.new_zeros(())
    return nearest(grid.name, wide_TI, scale, zero, grid.ends), scale, zero


def by_scale(x_TI: Tensor, scale: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    scale = scale.to(torch.float32, copy=True).reshape(())
    zero = torch.zeros_like(scale)
    return nearest(grid.name, x_TI.float(), scale, zero, grid.ends), scale, zero


def norm(
    x_TI: Tensor, weight_I: Tensor, eps: float, form: str, scale: Tensor | None, grid: InputGrid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed_TI = forward.rms_norm(x_TI, weight_I, eps, form).to(x_TI.dtype)
    found = by_token(normed_TI, grid) if scale is None else by_scale(normed_TI, scale, grid)
    return *found, normed_TI


def _range(low: Tensor, high: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor]:
    steps = torch.full_like(low, grid.qmax - grid.qmin)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)  # twice the largest float is none
        return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / steps
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)
