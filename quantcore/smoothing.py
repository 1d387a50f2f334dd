"""SmoothQuant: hand the spread of an input's channels over to the weights that read it.

A linear's output is the same when its inputs are divided, channel by channel, by s and its weights
multiplied by it. With

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

the outliers of activations become a little more spread in the weights, and both round better
(Xiao et al. 2022, https://arxiv.org/abs/2211.10438, section 4). The division costs nothing where
the inputs come from a norm: it goes into the norm's weight. That weight is rounded to its stored
dtype first and s is taken from what it became, so that what is served is what was measured.

Shape suffixes: O = out_features, I = in_features, S = sampled tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantcore.activations import fake_quantize, static_scale
from quantcore.affine import choose_qparams, dequantize, quantize
from quantcore.ranges import Ranges
from quantcore.schemes import Scheme

# How a norm uses its weight: y = n(x) * w, or y = n(x) * (1 + w)
NormRule = Literal["scale", "offset"]

SEARCHED_ALPHAS = tuple(step / 20 for step in range(21))
_LEAST = 1e-5  # of a factor, and of its inverse
_ROWS = 1024  # of a weight at a time: bounds the memory of a search


@dataclass(frozen=True, slots=True)
class Reader:
    """One linear that reads the smoothed input."""

    w_OI: Tensor  # as stored
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class StoredNorm:
    """A norm that the readers alone read."""

    weight_I: Tensor  # in the dtype of the checkpoint
    bias_I: Tensor | None
    rule: NormRule

    def folded(self, factor_I: Tensor) -> "FoldedNorm":
        return fold(self.weight_I, self.bias_I, factor_I, self.rule)


@dataclass(frozen=True, slots=True)
class FoldedNorm:
    weight_I: Tensor  # in the dtype of the checkpoint
    bias_I: Tensor | None
    factor_I: Tensor  # float32: what the norm's output is divided by now


@dataclass(frozen=True, slots=True)
class Smoothing:
    alpha: float | None  # None: left as it was
    factor_I: Tensor  # float32: inputs are divided by it, weights multiplied


def factors(ranges: Ranges, readers: Iterable[Reader], alpha: float) -> Tensor:
    """s, float32 (I,); 1 where an input never fired or no weight reads it."""
    largest_I = ranges.largest()
    weight_I = torch.stack([reader.w_OI.float().abs().amax(0) for reader in readers]).amax(0)
    factor_I = (largest_I.pow(alpha) / weight_I.pow(1 - alpha)).clamp(_LEAST, 1 / _LEAST)
    return torch.where((largest_I > 0) & (weight_I > 0), factor_I, 1.0)


def fold(weight_I: Tensor, bias_I: Tensor | None, factor_I: Tensor, rule: NormRule) -> FoldedNorm:
    """Divide a norm's output by `factor_I`, as nearly as its stored dtype allows.

    Where the weight would become zero, the norm keeps it and the factor is 1.
    """
    offset = 1.0 if rule == "offset" else 0.0
    gain_I = weight_I.float() + offset
    folded_I = (gain_I / factor_I - offset).to(weight_I.dtype)
    folded_gain_I = folded_I.float() + offset
    usable_I = (folded_gain_I * gain_I > 0) & folded_I.isfinite()
    folded_I = torch.where(usable_I, folded_I, weight_I)
    became_I = torch.where(usable_I, gain_I / folded_gain_I, 1.0)
    bias = None if bias_I is None else (bias_I.float() / became_I).to(bias_I.dtype)
    return FoldedNorm(folded_I, bias, became_I)


def search(
    ranges: Ranges,
    readers: Sequence[Reader],
    alphas: Iterable[float],
    became: Callable[[Tensor], Tensor],
) -> Smoothing:
    """The alpha, or none at all, under which the readers' outputs on the sample move least.

    Outputs are computed with weights rounded to nearest and activations rounded as while serving;
    each linear's error counts relative to its own output. `became` says what wanted factors come
    to once they are stored.
    """
    ones_I = torch.ones_like(ranges.low_I)
    best = Smoothing(None, ones_I)
    least = relative_error(ranges, readers, ones_I)
    for alpha in alphas:
        factor_I = became(factors(ranges, readers, alpha))
        error = relative_error(ranges, readers, factor_I)
        if error < least:
            best, least = Smoothing(alpha, factor_I), error
    return best


def smooth(
    ranges: Ranges, readers: Sequence[Reader], alphas: Sequence[float], norm: StoredNorm | None
) -> tuple[Smoothing, FoldedNorm | None]:
    """One alpha as it is, or the best of several; and what it makes of the norm before the readers.

    Without a norm the factors stay on the inputs.
    """

    def became(factor_I: Tensor) -> Tensor:
        return factor_I if norm is None else norm.folded(factor_I).factor_I

    if len(alphas) > 1:
        chosen = search(ranges, readers, alphas, became)
    else:
        chosen = Smoothing(alphas[0], became(factors(ranges, readers, alphas[0])))
    if norm is None or chosen.alpha is None:
        return chosen, None
    return chosen, norm.folded(factors(ranges, readers, chosen.alpha))


def relative_error(ranges: Ranges, readers: Iterable[Reader], factor_I: Tensor) -> float:
    """The sum over linears of |y - y_quantized|^2 / |y|^2 on the sampled tokens."""
    total = 0.0
    smooth_SI = ranges.sample_SI / factor_I
    for reader in readers:
        scale = input_scale(ranges, factor_I, reader.scheme, reader.w_OI.dtype)
        x_SI = fake_quantize(smooth_SI, reader.scheme, scale)
        error = norm = 0.0
        largest = (reader.w_OI.abs().amax(0).float() * factor_I).amax()
        for w_OI in torch.split(reader.w_OI, _ROWS):
            y_SO = ranges.sample_SI @ w_OI.float().t()
            smooth_OI = w_OI.float() * factor_I
            qparams = choose_qparams(smooth_OI, reader.scheme, stored=w_OI.dtype, largest=largest)
            codes_OI = quantize(smooth_OI, qparams, reader.scheme)
            rounded_OI = dequantize(codes_OI, qparams, reader.scheme)
            error += (y_SO - x_SI @ rounded_OI.t()).square().sum(dtype=torch.float64).item()
            norm += y_SO.square().sum(dtype=torch.float64).item()
        total += error / norm if norm > 0 else 0.0
    return total


def input_scale(
    ranges: Ranges, factor_I: Tensor, scheme: Scheme, stored: torch.dtype
) -> float | None:
    """The scale of a static scheme's smoothed inputs; None for other schemes."""
    if not scheme.static:
        return None
    return static_scale(ranges.largest() / factor_I, scheme, stored)
