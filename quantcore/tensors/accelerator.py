"""torch's own kernels for layouts of its own on CUDA, each with the shapes that it is right for.

Rounding, beside the reference's: int4 reads a weight in bfloat16, with one rounding; integer by
integer products are exact, and scaled in float32.

Shape suffixes: T = tokens, O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from quantcore.activations import served_inputs
from quantcore.tensors.cpu import FLOATS, with_bias
from quantcore.tensors.tensor import QuantizedTensor

_SPARSE_ROWS = 16  # cuSPARSELt multiplies by multiples of this


def takes_int4(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    """ROCm, which calls itself CUDA, has other tiles."""
    return x_TI.dtype == torch.bfloat16 and x_TI.shape[0] > 0 and torch.version.hip is None


def int4(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    size = weight.scheme.group_size
    y_TO = torch.ops.aten._weight_int4pack_mm(x_TI.contiguous(), weight.codes, size, weight.scale)
    return with_bias(y_TO, bias_O)


def takes_sparse(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype in FLOATS and x_TI.shape[0] > 0


def sparse_by_int8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    tokens = x_TI.shape[0]
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    codes_TI = torch.nn.functional.pad(served.codes_TI, (0, 0, 0, -tokens % _SPARSE_ROWS))
    sums_OT = torch._cslt_sparse_mm(weight.codes, codes_TI.t(), out_dtype=torch.int32)
    y_TO = sums_OT.t()[:tokens].float() * served.scale * weight.scale[:, 0].float()
    return with_bias(y_TO, bias_O).to(x_TI.dtype)
