"""The quantized tensor and its layouts: see tensor.py."""

from quantcore.tensors.layouts import LAYOUTS, Layout
from quantcore.tensors.packing import pruned_24, relayout
from quantcore.tensors.stored import flatten_state, unflatten_state
from quantcore.tensors.tensor import QuantizedTensor

__all__ = [
    "LAYOUTS",
    "Layout",
    "QuantizedTensor",
    "flatten_state",
    "pruned_24",
    "relayout",
    "unflatten_state",
]
