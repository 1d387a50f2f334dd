"""What quantized activations are while a model serves, so that a choice can be made with them.

A symmetric integer grid spreads max|x| over 2**bits - 1 steps, as for weights (affine.py); one
with a zero point spreads the extremes, 0 among them; a float8 grid carries max|x| to its largest
value. A dynamic scheme finds its scale while serving: one for every token, or, where weights have
one scale for a whole tensor, one for all tokens of a call. A static scheme has one, found in
calibration. quantkernels/rounding has the formulas, and on a GPU does it in a pass.

Shape suffixes: T = tokens, I = in_features.
"""

from dataclasses import dataclass

import torch
from quantkernels import rounding
from quantkernels.grids import GridName, values
from quantkernels.rounding import InputGrid
from torch import Tensor

from quantcore.schemes import Activations, FloatGrid, Scheme


def static_scale(largest_I: Tensor, scheme: Scheme, stored: torch.dtype) -> float:
    """The scale of all tokens, from the largest magnitudes seen, as the `stored` dtype has it."""
    activations = scheme.activations
    assert activations is not None
    grid = activations.grid
    largest = largest_I.amax().float()
    scale = float((largest * 2 / (grid.highest - grid.lowest)).to(stored).item())
    return scale if scale > 0 else 1.0


@dataclass(frozen=True, slots=True)
class ServedInputs:
    """Activations on their grid."""

    codes_TI: Tensor  # int8; of float8, its bits
    scale: Tensor  # float32: (T, 1), or () for all
    zero: Tensor  # the same, in whole numbers

    def values(self, activations: Activations) -> Tensor:
        """What the codes stand for, float32."""
        return values(_input_grid(activations).name, self.codes_TI, self.scale, self.zero)


def served_inputs(
    x_TI: Tensor, scheme: Scheme, input_scale: Tensor | float | None = None
) -> ServedInputs:
    """Activations rounded as a scheme with activations has it.

    `input_scale` is the scale of a static scheme; without one, the activations get their own.
    """
    assert scheme.activations is not None
    grid = _input_grid(scheme.activations)
    if input_scale is not None:
        if not isinstance(input_scale, Tensor):
            input_scale = torch.full((), input_scale, dtype=torch.float32, device=x_TI.device)
        return ServedInputs(*rounding.by_scale(x_TI, input_scale, grid))
    find = rounding.by_tensor if scheme.per_tensor else rounding.by_token
    return ServedInputs(*find(x_TI, grid))


def fake_quantize(
    x_TI: Tensor, scheme: Scheme, input_scale: Tensor | float | None = None
) -> Tensor:
    """Activations as a scheme's linears see them, in x's dtype; unchanged if it is weight-only."""
    activations = scheme.activations
    if activations is None:
        return x_TI
    grid = _input_grid(activations)
    if input_scale is None and not scheme.per_tensor and grid.name == "affine":
        return rounding.rounded_by_token(x_TI, grid)
    return served_inputs(x_TI, scheme, input_scale).values(activations).to(x_TI.dtype)


def _input_grid(activations: Activations) -> InputGrid:
    grid = activations.grid
    name: GridName = "float8" if isinstance(grid, FloatGrid) else "affine"
    return InputGrid(name, grid.lowest, grid.highest, activations.symmetric)
