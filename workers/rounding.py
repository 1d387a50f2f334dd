"""Linears rounded one by one, without a look at their inputs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, quantize
from quantcore.formats import FORMATS, QuantizedLinear
from quantcore.hqq import hqq_qparams
from workers.plan import LayerPlan, Plan
from workers.sources import ModelSource

Rounded = Iterator[tuple[LayerPlan, Tensor, QuantizedLinear]]


def rounded_stack(stack: list[LayerPlan], source: ModelSource, form: str) -> Rounded:
    """Each linear of a stack with its weight as the source has it, and rounded as `form` can."""
    largest = _largest(stack, source)
    for layer in stack:
        assert layer.scheme is not None
        ((_, w_OI),) = source.read([f"{layer.name}.weight"])
        qparams = choose_qparams(w_OI, layer.scheme, stored=w_OI.dtype, largest=largest)
        qparams = FORMATS[form].storable(qparams, layer.scheme, w_OI.dtype)
        codes_OI = quantize(w_OI, qparams, layer.scheme)
        yield layer, w_OI, QuantizedLinear(codes_OI, qparams, layer.scheme)


def fitted_stack(
    plan: Plan, stack: list[LayerPlan], source: ModelSource, device: torch.device
) -> Rounded:
    """The same by the stack's own method, which looks at weights alone. HQQ has the device."""
    if plan.rounding(stack[0]) != "hqq":
        yield from rounded_stack(stack, source, plan.format)
        return
    for layer in stack:
        assert layer.scheme is not None
        ((_, w_OI),) = source.read([f"{layer.name}.weight"])
        there_OI = w_OI.to(device)
        qparams = hqq_qparams(there_OI, layer.scheme, plan.hqq, stored=w_OI.dtype)
        qparams = FORMATS[plan.format].storable(qparams, layer.scheme, w_OI.dtype)
        codes_OI = quantize(there_OI, qparams, layer.scheme).cpu()
        qparams = Qparams(qparams.scale_OG.cpu(), qparams.zero_OG.cpu())
        yield layer, w_OI, QuantizedLinear(codes_OI, qparams, layer.scheme)


def grid_of(
    plan: Plan, layer: LayerPlan, w_OI: Tensor, *, stored: torch.dtype, largest: Tensor | None
) -> Qparams:
    """The grid whose nearest codes are a linear's: fitted by HQQ, or from the extremes."""
    assert layer.scheme is not None
    if plan.rounding(layer) == "hqq":
        return hqq_qparams(w_OI, layer.scheme, plan.hqq, stored=stored)
    return choose_qparams(w_OI, layer.scheme, stored=stored, largest=largest)


def _largest(stack: list[LayerPlan], source: ModelSource) -> Tensor | None:
    """max|w| of a stack under one scale: engines load its linears as one matrix."""
    scheme = stack[0].scheme
    if scheme is None or not scheme.per_tensor:
        return None
    weights = (w_OI for _, w_OI in source.read(f"{layer.name}.weight" for layer in stack))
    return max(w_OI.abs().amax() for w_OI in weights)
