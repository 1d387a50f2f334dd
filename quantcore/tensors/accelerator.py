"""torch's own kernels for CUDA, and for XPU, each with the shapes and dtypes that it is right for.

Rounding, beside the reference's: int4 reads a weight in bfloat16, with one rounding; integer by
integer products are exact, and scaled in float32; float8 products are scaled as they leave float32.

Shape suffixes: T = tokens, O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from quantcore.activations import served_inputs
from quantcore.schemes import FloatGrid
from quantcore.tensors.cpu import with_bias
from quantcore.tensors.tensor import QuantizedTensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ROWS = 32  # cuBLAS multiplies 17 rows of bytes or more
_SPARSE_ROWS = 16  # cuSPARSELt multiplies by multiples of this


def takes_int4(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    """ROCm, which calls itself CUDA, has other tiles."""
    return x_TI.dtype == torch.bfloat16 and x_TI.shape[0] > 0 and torch.version.hip is None


def int4(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    size = weight.scheme.group_size
    y_TO = torch.ops.aten._weight_int4pack_mm(x_TI.contiguous(), weight.codes, size, weight.scale)
    return with_bias(y_TO, bias_O)


def takes_int8_by_int8(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    rows, columns = weight.facts.features
    return x_TI.dtype in _FLOATS and rows % 8 == 0 and columns % 8 == 0


def int8_by_int8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    tokens = x_TI.shape[0]
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    codes_TI = served.codes_TI
    if tokens < _LEAST_ROWS:
        codes_TI = torch.nn.functional.pad(codes_TI, (0, 0, 0, _LEAST_ROWS - tokens))
    sums_TO = torch._int_mm(codes_TI, weight.codes.contiguous().t())[:tokens]
    y_TO = sums_TO.float() * served.scale * weight.scale[:, 0].float()
    return with_bias(y_TO, bias_O).to(x_TI.dtype)


def takes_sparse(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype in _FLOATS and x_TI.shape[0] > 0


def sparse_by_int8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    tokens = x_TI.shape[0]
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    codes_TI = torch.nn.functional.pad(served.codes_TI, (0, 0, 0, -tokens % _SPARSE_ROWS))
    sums_OT = torch._cslt_sparse_mm(weight.codes, codes_TI.t(), out_dtype=torch.int32)
    y_TO = sums_OT.t()[:tokens].float() * served.scale * weight.scale[:, 0].float()
    return with_bias(y_TO, bias_O).to(x_TI.dtype)


def takes_float8(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    rows, columns = weight.facts.features
    fits = rows % 16 == 0 and columns % 16 == 0 and x_TI.shape[0] > 0
    return fits and x_TI.dtype == torch.bfloat16 and torch.version.hip is None


def float8_by_float8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    """A scale for each row and column: where they share one, it is repeated."""
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    activations = weight.scheme.activations
    assert activations is not None and isinstance(activations.grid, FloatGrid)
    y_TO = torch._scaled_mm(
        served.codes_TI.view(activations.grid.dtype),
        weight.codes.contiguous().t(),
        served.scale.reshape(-1, 1).expand(x_TI.shape[0], 1).contiguous(),
        weight.scale.float().reshape(1, -1),
        out_dtype=torch.bfloat16,
    )
    return with_bias(y_TO, bias_O)
