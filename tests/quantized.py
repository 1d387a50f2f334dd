"""Quantized weights to test with, and what a linear of theirs computes, in float64 from formulas.

Shape suffixes: O = out_features, I = in_features, T = tokens.
"""

import numpy as np
import torch
from torch import Tensor

from quantcore.affine import choose_qparams, quantize
from quantcore.formats import QuantizedLinear
from quantcore.schemes import SCHEME_KINDS, FloatGrid, Scheme, every_form
from quantcore.tensors import LAYOUTS, Layout, QuantizedTensor, pruned_24, relayout
from tests.references import Float, float8_values, spread

FORMS = [scheme for name in SCHEME_KINDS for scheme in every_form(name, [32])]
INPUT_SCALE = float(torch.tensor(0.0317))  # a rounder one would make ties


def linear(
    scheme: Scheme,
    rows: int,
    width: int,
    *,
    stored: torch.dtype = torch.bfloat16,
    factor: bool = False,
    sparse: bool = False,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    w_OI = torch.randn(rows, width, generator=generator) + 0.3
    w_OI = pruned_24(w_OI) if sparse else w_OI
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    return QuantizedLinear(
        quantize(w_OI, qparams, scheme),
        qparams,
        scheme,
        INPUT_SCALE if scheme.static else None,
        torch.rand(width, generator=generator) + 0.5 if factor else None,
        stored,
    )


def layouts_of(scheme: Scheme, dtype: torch.dtype) -> list[Layout]:
    """Those that take a CPU's weight of 32 rows in groups of 32."""
    weight = QuantizedTensor.of(linear(scheme, 32, 64, sparse=True), dtype)
    takes = []
    for layout in LAYOUTS:
        try:
            relayout(weight, layout)
        except Exception:
            continue
        takes.append(layout)
    return takes


def laid(ours: QuantizedLinear, dtype: torch.dtype, layout: Layout) -> QuantizedTensor:
    return relayout(QuantizedTensor.of(ours, dtype), layout)


def weight_of(ours: QuantizedLinear) -> Float:
    """float64 (O, I), for inputs that were divided by the factor."""
    width = ours.codes_OI.shape[1]
    scale_OI = spread(ours.qparams.scale_OG, width)
    zero_OI = spread(ours.qparams.zero_OG, width)
    codes_OI = ours.codes_OI.numpy().astype(np.float64)
    if isinstance(ours.scheme.grid, FloatGrid):
        values, codes = float8_values()
        table = dict(zip(codes.tolist(), values.tolist(), strict=True))
        codes_OI = np.vectorize(table.__getitem__, otypes=[np.float64])(codes_OI.astype(int))
    if ours.scheme.zero_point == "float":
        return codes_OI * scale_OI + zero_OI
    return (codes_OI - zero_OI) * scale_OI


def served(x_TI: Float, ours: QuantizedLinear) -> Float:
    """Inputs divided by the factor and rounded as the scheme has it."""
    if ours.input_factor_I is not None:
        x_TI = x_TI / ours.input_factor_I.double().numpy()
    activations = ours.scheme.activations
    if activations is None or not x_TI.size:
        return x_TI
    largest = np.abs(x_TI).max(axis=None if ours.scheme.per_tensor else 1, keepdims=True)
    largest = np.where(largest > 0, largest, 1)
    if isinstance(activations.grid, FloatGrid):
        scale = largest / 448
        scale = np.full_like(scale, INPUT_SCALE) if activations.static else scale
        values, _ = float8_values()
        distance = np.abs(np.clip(x_TI / scale, -448, 448)[..., None] - values)
        rounded: Float = values[distance.argmin(axis=-1)] * scale
        return rounded
    if activations.symmetric:
        scale = largest * 2 / 255
        scale = np.full_like(scale, INPUT_SCALE) if activations.static else scale
        zero = np.zeros_like(scale)
    else:
        low = np.minimum(x_TI.min(axis=1, keepdims=True), 0)
        high = np.maximum(x_TI.max(axis=1, keepdims=True), 0)
        scale = np.where(high > low, (high - low) / 255, 1)
        zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    return (np.clip(np.rint(x_TI / scale) + zero, -128, 127) - zero) * scale


def expected(x: Tensor, ours: QuantizedLinear, bias_O: Tensor | None) -> Float:
    """y = served(x / factor) W^T + b, of any leading dimensions."""
    x_TI = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    y_TO = served(x_TI, ours) @ weight_of(ours).T
    y_TO = y_TO if bias_O is None else y_TO + bias_O.detach().double().numpy()
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    """Inputs whose largest magnitudes are positive: -127.5 steps would be a tie."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator) * 1.5
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    return (x * largest.sign()).to(dtype)


def relative(actual: Tensor, wanted: Float) -> float:
    difference = actual.detach().double().numpy() - wanted
    return float(np.linalg.norm(difference) / max(np.linalg.norm(wanted), 1e-30))
