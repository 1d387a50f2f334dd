"""What quantized activations are while a model serves, so that a choice can be made with them.

A symmetric integer grid spreads max|x| over 2**bits - 1 steps, as for weights (affine.py); one
with a zero point spreads the extremes, 0 among them; a float8 grid carries max|x| to its largest
value. A dynamic scheme finds its scale while serving: one for every token, or, where weights have
one scale for a whole tensor, one for all tokens of a call. A static scheme has one, found in
calibration.

Shape suffixes: T = tokens, I = in_features.
"""

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


def fake_quantize(x_TI: Tensor, scheme: Scheme, input_scale: float | None = None) -> Tensor:
    """Activations as a scheme's linears see them, in x's dtype; unchanged if it is weight-only.

    `input_scale` is the scale of a static scheme; without one, the activations get their own.
    """
    activations = scheme.activations
    if activations is None:
        return x_TI
    grid = activations.grid
    name: GridName = "float8" if isinstance(grid, FloatGrid) else "affine"
    x32_TI = x_TI.float()
    if input_scale is None:
        scale, zero = _dynamic(x32_TI, activations, whole=scheme.per_tensor)
    else:
        scale = torch.tensor(input_scale, device=x_TI.device)
        zero = torch.zeros_like(scale)
    codes_TI = nearest(name, x32_TI, scale, zero, (grid.lowest, grid.highest))
    return values(name, codes_TI, scale, zero).to(x_TI.dtype)


def _dynamic(x_TI: Tensor, activations: Activations, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each token, (T, 1), or of all."""
    low, high = x_TI.amin(-1, keepdim=True), x_TI.amax(-1, keepdim=True)
    if whole and len(low):
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
