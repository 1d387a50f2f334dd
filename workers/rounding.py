"""Linears rounded one by one, without a look at their inputs."""

from collections.abc import Iterator

from torch import Tensor

from quantcore.affine import choose_qparams, quantize
from quantcore.formats import FORMATS, QuantizedLinear
from workers.plan import LayerPlan
from workers.sources import ModelSource


def rounded_stack(
    stack: list[LayerPlan], source: ModelSource, form: str
) -> Iterator[tuple[LayerPlan, Tensor, QuantizedLinear]]:
    """Each linear of a stack with its weight as the source has it, and rounded as `form` can."""
    largest = _largest(stack, source)
    for layer in stack:
        assert layer.scheme is not None
        ((_, w_OI),) = source.read([f"{layer.name}.weight"])
        qparams = choose_qparams(w_OI, layer.scheme, stored=w_OI.dtype, largest=largest)
        qparams = FORMATS[form].storable(qparams, layer.scheme, w_OI.dtype)
        codes_OI = quantize(w_OI, qparams, layer.scheme)
        yield layer, w_OI, QuantizedLinear(codes_OI, qparams, layer.scheme)


def _largest(stack: list[LayerPlan], source: ModelSource) -> Tensor | None:
    """max|w| of a stack under one scale: engines load its linears as one matrix."""
    scheme = stack[0].scheme
    if scheme is None or not scheme.per_tensor:
        return None
    weights = (w_OI for _, w_OI in source.read(f"{layer.name}.weight" for layer in stack))
    return max(w_OI.abs().amax() for w_OI in weights)
