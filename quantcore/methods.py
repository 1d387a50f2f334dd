"""The ways to choose codes for linears that read one input, each a function and a row of a table.

Rounding takes the nearest codes, HQQ (hqq.py) those of a fitted grid; GPTQ (gptq.py) needs the
Hessian of the inputs, and SmoothQuant (smoothing.py) their ranges. None falls back to another: what
can't be done is an error.

Shape suffixes: O = out_features, I = in_features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, quantize, search_qparams
from quantcore.errors import QuantizationError
from quantcore.formats.base import QuantizedLinear
from quantcore.gptq import Factor, GptqConfig, factorize, solve
from quantcore.hqq import HqqConfig, hqq_qparams
from quantcore.recorder import InputStatistics
from quantcore.schemes import IntegerGrid, Scheme
from quantcore.smoothing import (
    SEARCHED_ALPHAS,
    FoldedNorm,
    Reader,
    Smoothing,
    StoredNorm,
    input_scale,
    smooth,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What methods may be told; each reads its own."""

    gptq: GptqConfig = field(default_factory=GptqConfig)
    hqq: HqqConfig = field(default_factory=HqqConfig)
    search_range: bool = True  # GPTQ: each group's range by its weighted error, else its extremes
    alphas: tuple[float, ...] = SEARCHED_ALPHAS  # SmoothQuant: a single one is taken as it is
    smoothed_rounding: Literal["rtn", "gptq"] = "rtn"  # SmoothQuant: of the smoothed weights


@dataclass(frozen=True, slots=True)
class Readers:
    """Linears that read one input, under one scheme."""

    weights: Mapping[str, Tensor]  # by name, (O, I)
    scheme: Scheme
    statistics: InputStatistics | None
    norm: StoredNorm | None = None  # that they alone read


@dataclass(frozen=True, slots=True)
class Chosen:
    linears: Mapping[str, QuantizedLinear]
    norm: FoldedNorm | None = None


@dataclass(frozen=True, slots=True)
class Method:
    run: Callable[[Readers, Options], Chosen]
    needs: Sequence[Literal["moments", "ranges"]] = ()
    activations: bool = False  # whether the scheme must round them
    integers: bool = False  # whether the scheme's grid must be one of integers


def _round(readers: Readers, options: Options) -> Chosen:
    return Chosen(_smoothed(readers, options, None, None))


def _hqq(readers: Readers, options: Options) -> Chosen:
    scheme = readers.scheme
    linears = {}
    for name, w_OI in readers.weights.items():
        qparams = hqq_qparams(w_OI, scheme, options.hqq, stored=w_OI.dtype)
        codes_OI, static = quantize(w_OI, qparams, scheme), _static_scale(readers, None, w_OI)
        linears[name] = QuantizedLinear(codes_OI, qparams, scheme, static, None, w_OI.dtype)
    return Chosen(linears)


def _gptq(readers: Readers, options: Options) -> Chosen:
    return Chosen(_smoothed(readers, options, None, _hessian(readers)))


def _smoothquant(readers: Readers, options: Options) -> Chosen:
    assert readers.statistics is not None and readers.statistics.ranges is not None
    each = [Reader(w_OI, readers.scheme) for w_OI in readers.weights.values()]
    smoothing, folded = smooth(readers.statistics.ranges, each, options.alphas, readers.norm)
    h_II = None
    if options.smoothed_rounding == "gptq":
        h_II = _hessian(readers) / smoothing.factor_I / smoothing.factor_I[:, None]
    linears = _smoothed(readers, options, smoothing, h_II)
    return Chosen(linears, folded)


def _hessian(readers: Readers) -> Tensor:
    assert readers.statistics is not None and readers.statistics.moments is not None
    return readers.statistics.moments.mean()


def _smoothed(
    readers: Readers, options: Options, smoothing: Smoothing | None, h_II: Tensor | None
) -> dict[str, QuantizedLinear]:
    """Every weight times the factors, solved with H (of inputs divided by them) or rounded."""
    scheme = readers.scheme
    factor = None if h_II is None else factorize(h_II, options.gptq)
    linears = {}
    for name, w_OI in readers.weights.items():
        smooth_OI = w_OI if smoothing is None else w_OI.float() * smoothing.factor_I
        codes_OI, qparams = _codes(smooth_OI, scheme, w_OI.dtype, h_II, factor, options)
        linears[name] = QuantizedLinear(
            codes_OI,
            qparams,
            scheme,
            _static_scale(readers, smoothing, w_OI),
            _kept_factor(readers, smoothing),
            w_OI.dtype,
        )
    return linears


def _codes(
    w_OI: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    h_II: Tensor | None,
    factor: Factor | None,
    options: Options,
) -> tuple[Tensor, Qparams]:
    if h_II is None or factor is None:
        qparams = choose_qparams(w_OI, scheme, stored=stored)
        return quantize(w_OI, qparams, scheme), qparams
    if options.search_range and scheme.searchable:
        qparams = search_qparams(w_OI, factor.column_costs(), scheme, stored=stored)
    else:
        qparams = choose_qparams(w_OI, scheme, stored=stored)
    return solve(w_OI, qparams, scheme, factor, options.gptq.block_columns), qparams


def _static_scale(readers: Readers, smoothing: Smoothing | None, w_OI: Tensor) -> float | None:
    if not readers.scheme.static:
        return None
    assert readers.statistics is not None and readers.statistics.ranges is not None
    ranges = readers.statistics.ranges
    factor_I = torch.ones_like(ranges.low_I) if smoothing is None else smoothing.factor_I
    return input_scale(ranges, factor_I, readers.scheme, w_OI.dtype)


def _kept_factor(readers: Readers, smoothing: Smoothing | None) -> Tensor | None:
    """A factor that no norm took stays on the inputs."""
    if smoothing is None or smoothing.alpha is None or readers.norm is not None:
        return None
    return smoothing.factor_I


METHODS: dict[str, Method] = {
    "rtn": Method(_round),
    "hqq": Method(_hqq, integers=True),
    "gptq": Method(_gptq, needs=("moments",)),
    "smoothquant": Method(_smoothquant, needs=("ranges",), activations=True),
}


def needed(method: str, scheme: Scheme, options: Options) -> set[str]:
    """Which statistics a recorder must have for it."""
    needs: set[str] = set(METHODS[method].needs)
    if scheme.static:
        needs.add("ranges")
    if method == "smoothquant" and options.smoothed_rounding == "gptq":
        needs.add("moments")
    return needs


def refuse_unknown(method: str, scheme: Scheme) -> None:
    if method not in METHODS:
        raise QuantizationError(f"method: unknown '{method}': write {' or '.join(METHODS)}")
    if METHODS[method].activations and scheme.activations is None:
        raise QuantizationError(
            f"method: {method} helps activations to be rounded, which {scheme.name} leaves as they "
            "are: write a scheme that rounds them, or another method"
        )
    if METHODS[method].integers and not isinstance(scheme.grid, IntegerGrid):
        raise QuantizationError(
            f"method: {method} fits integer grids, and that of {scheme.name} is none: "
            "write rtn or gptq"
        )
