"""What quantized activations are while a model serves, so that a choice can be made with them.

Codes are signed and symmetric: x is stored as round(x / s), and max|x| is spread over 2**bits - 1
steps, as for weights (affine.py). A dynamic scheme finds s for every token; a static one has one s
for all, found in calibration.

Shape suffixes: T = tokens, I = in_features.
"""

import torch
from torch import Tensor

from quantcore.affine import code_range
from quantcore.schemes import Scheme


def static_scale(largest_I: Tensor, scheme: Scheme, stored: torch.dtype) -> float:
    """The scale of all tokens, from the largest magnitudes seen, as the `stored` dtype has it."""
    scale = float((_scale_of(largest_I.amax(), scheme)).to(stored).item())
    return scale if scale > 0 else 1.0


def fake_quantize(x_TI: Tensor, scheme: Scheme, input_scale: float | None = None) -> Tensor:
    """Activations as a scheme's linears see them, in x's dtype; unchanged if it is weight-only.

    `input_scale` is the scale of a static scheme; without one, each token gets its own.
    """
    if scheme.kind.activation_bits is None:
        return x_TI
    qmin, qmax = code_range(scheme.kind.activation_bits)
    x32_TI = x_TI.float()
    if input_scale is None:
        scale_T1 = _scale_of(x32_TI.abs().amax(-1, keepdim=True), scheme)
        scale_T1 = torch.where(scale_T1 > 0, scale_T1, 1.0)
    else:
        scale_T1 = torch.tensor(input_scale, device=x_TI.device)
    codes_TI = (x32_TI / scale_T1).round().clamp(qmin, qmax)
    return (codes_TI * scale_T1).to(x_TI.dtype)


def _scale_of(largest: Tensor, scheme: Scheme) -> Tensor:
    assert scheme.kind.activation_bits is not None
    qmin, qmax = code_range(scheme.kind.activation_bits)
    return largest.float() * 2 / (qmax - qmin)
