"""What quantized activations are while a model serves, so that a choice can be made with them.

A symmetric integer grid spreads max|x| over 2**bits - 1 steps, as for weights (affine.py); one
with a zero point spreads the extremes, 0 among them; a float8 grid carries max|x| to its largest
value. A dynamic scheme finds its scale while serving: one for every token, or, where weights have
one scale for a whole tensor, one for all tokens of a call. A static scheme has one, found in
calibration.

Shape suffixes: T = tokens, I = in_features.
"""

from dataclasses import dataclass

import torch
from quantkernels.grids import GridName, nearest, values
from torch import Tensor

from quantcore.schemes import Activations, FloatGrid, Scheme


def static_scale(largest_I: Tensor, scheme: Scheme, stored: torch.dtype) -> float:
    """The scale of all tokens, from the largest magnitudes seen, as the `stored` dtype has it."""
    activations = scheme.activations
    assert activations is not None
    scale = float(_symmetric_scale(largest_I.amax(), activations).to(stored).item())
    return scale if scale > 0 else 1.0


@dataclass(frozen=True, slots=True)
class ServedInputs:
    """Activations on their grid."""

    codes_TI: Tensor  # int8; of float8, its bits
    scale: Tensor  # float32: (T, 1), or of one entry for all
    zero: Tensor  # the same, in whole numbers

    def values(self, activations: Activations) -> Tensor:
        """What the codes stand for, float32."""
        return values(_grid_name(activations), self.codes_TI, self.scale, self.zero)


def served_inputs(
    x_TI: Tensor, scheme: Scheme, input_scale: Tensor | float | None = None
) -> ServedInputs:
    """Activations rounded as a scheme with activations has it.

    `input_scale` is the scale of a static scheme; without one, the activations get their own.
    """
    activations = scheme.activations
    assert activations is not None
    grid = activations.grid
    x32_TI = x_TI.float()
    if input_scale is None:
        scale, zero = _dynamic(x32_TI, activations, whole=scheme.per_tensor)
    else:
        if not isinstance(input_scale, Tensor):
            input_scale = torch.tensor(input_scale, device=x_TI.device)
        scale = input_scale.float()
        zero = torch.zeros_like(scale)
    ends = (grid.lowest, grid.highest)
    return ServedInputs(nearest(_grid_name(activations), x32_TI, scale, zero, ends), scale, zero)


def fake_quantize(
    x_TI: Tensor, scheme: Scheme, input_scale: Tensor | float | None = None
) -> Tensor:
    """Activations as a scheme's linears see them, in x's dtype; unchanged if it is weight-only."""
    activations = scheme.activations
    if activations is None:
        return x_TI
    return served_inputs(x_TI, scheme, input_scale).values(activations).to(x_TI.dtype)


def _grid_name(activations: Activations) -> GridName:
    return "float8" if isinstance(activations.grid, FloatGrid) else "affine"


def _dynamic(x_TI: Tensor, activations: Activations, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each token, (T, 1), or of all."""
    low, high = x_TI.amin(-1, keepdim=True), x_TI.amax(-1, keepdim=True)
    if whole and low.shape[0]:
        low, high = low.amin(), high.amax()
    if activations.symmetric:
        scale = _symmetric_scale(torch.maximum(-low, high), activations)
        return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
    ends = (activations.grid.lowest, activations.grid.highest)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (ends[1] - ends[0])
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (ends[0] - low / scale).round().clamp(*ends)


def _symmetric_scale(largest: Tensor, activations: Activations) -> Tensor:
    grid = activations.grid
    return largest.float() * 2 / (grid.highest - grid.lowest)
