"""Activations rounded to 8 bits or fewer, before a product with quantized weights.

    by_token            each row by the scale that its own extremes ask for
    by_tensor           all rows by one scale, from the extremes of all
    by_scale            all rows by a scale that is given
    norm                by_token or by_scale, of an RMS norm's output in x's dtype
    rounded_by_token    what by_token's codes stand for, s (q - z), in x's dtype

The formulas stand at the top of reference.py. Every path gives the same codes and scales, bit for
bit: a float32 division is IEEE's, and ties go to even. `x_TI` is float32, bfloat16 or float16, of
any strides, and T stands for any leading dimensions; without tokens the scale of all is 1. Codes
are contiguous, int8 (of float8 its bits), and stand with their scale and zero point (of a symmetric
grid, 0), float32, (T, 1) or (). Nothing waits for a device, and torch.compile and torch.export
see operators of their own (operators.py).

What is not finite does not pass for something else: a row with a NaN has NaN for its scale, one
with an infinity an infinite scale, so that products come out as NaN or infinite; by tensor, those
of all rows do. By a given scale an infinity takes the grid's end, and a NaN float8's NaN, of
whichever sign; a grid of whole numbers has none, and gives 0.
"""

from torch import Tensor

from quantkernels.forward import NormForm
from quantkernels.rounding import operators, reference
from quantkernels.rounding.reference import InputGrid

FUSED_DEVICES = ("cuda", "xpu")

Codes = tuple[Tensor, Tensor, Tensor]  # with their scale and zero point

__all__ = ["InputGrid", "by_scale", "by_tensor", "by_token", "norm", "rounded_by_token"]


def by_token(x_TI: Tensor, grid: InputGrid) -> Codes:
    """Scale and zero point are (T, 1)."""
    if x_TI.device.type in FUSED_DEVICES:
        found: Codes = operators.by_token(x_TI, *grid.fields)
        return found
    return reference.by_token(x_TI, grid)


def rounded_by_token(x_TI: Tensor, grid: InputGrid) -> Tensor:
    """x on a grid of whole numbers, for a product in x's dtype.

    Bit for bit what `by_token`'s codes stand for in float32, rounded to x's dtype once. What
    float16 cannot hold is infinite there.
    """
    if x_TI.device.type in FUSED_DEVICES:
        found: Tensor = operators.rounded_by_token(x_TI, *grid.fields)
        return found
    return reference.rounded_by_token(x_TI, grid)


def by_tensor(x_TI: Tensor, grid: InputGrid) -> Codes:
    """Scale and zero point are ()."""
    if x_TI.device.type in FUSED_DEVICES:
        found: Codes = operators.by_tensor(x_TI, *grid.fields)
        return found
    return reference.by_tensor(x_TI, grid)


def by_scale(x_TI: Tensor, scale: Tensor, grid: InputGrid) -> Codes:
    """By a scale of one entry, on x's device, in any float dtype; the grid is symmetric.

    Scale and zero point are ().
    """
    if x_TI.device.type in FUSED_DEVICES:
        found: Codes = operators.by_scale(x_TI, scale, *grid.fields)
        return found
    return reference.by_scale(x_TI, scale, grid)


def norm(
    x_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    form: NormForm,
    grid: InputGrid,
    *,
    scale: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`forward.rms_norm`, by token or by a scale that is given; last its values, if to be kept.

    The codes are those of exactly these values, which differ from `forward.rms_norm`'s on the same
    device in the order of one sum at most.
    """
    if x_TI.device.type in FUSED_DEVICES:
        found = operators.norm(x_TI, weight_I, eps, form, scale, keep, *grid.fields)
    else:
        found = reference.norm(x_TI, weight_I, eps, form, scale, grid)
    codes_TI, scale, zero, normed_TI = found
    return codes_TI, scale, zero, normed_TI if keep else None
