"""torch's own kernels for a CPU, each with the shapes and dtypes that it is right for.

Rounding, beside the reference's: int4 and int8 read a weight as code times scale in the kernel,
scales in x's dtype, sums in float32. Integer by integer products are exact, and scaled in float32.
float8 products are exact in float32, and so are their sums' terms.

The kernel for 8-bit inputs and 4-bit weights is KleidiAI's on ARM. No ARM was at hand: on x86 torch
has a plain loop of the same function, slow, and what is tested is that.

Shape suffixes: T = tokens, O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from quantcore.activations import served_inputs
from quantcore.schemes import FloatGrid
from quantcore.tensors.tensor import QuantizedTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def with_bias(y_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_TO if bias_O is None else y_TO + bias_O


def takes_int4(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype == torch.bfloat16


def int4(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    size = weight.scheme.group_size
    y_TO = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_TI.contiguous(), weight.codes, size, weight.scale
    )
    return with_bias(y_TO, bias_O)


def takes_int4_dynamic(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    """bfloat16 has a kernel for whole rows alone, and it sums in bfloat16."""
    return x_TI.dtype == torch.float32


def int4_dynamic(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    rows, columns = weight.facts.features
    size = weight.scheme.group_size or columns
    y_TO = torch.ops.aten._dyn_quant_matmul_4bit(
        x_TI.contiguous(), weight.codes, size, columns, rows
    )
    return with_bias(y_TO, bias_O)


def takes_int8(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    """One scale per row, in bfloat16 like x: torch.compile takes no cast of it here.

    In others the kernel is a plain loop; rows that fill no vector are read past their end.
    """
    whole = weight.scheme.group_size is None and weight.scheme.zero_point == "none"
    fits = weight.facts.features[1] % 32 == 0
    return whole and fits and x_TI.dtype == weight.scale.dtype == torch.bfloat16


def int8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    y_TO = torch.ops.aten._weight_int8pack_mm(
        x_TI.contiguous(), weight.codes.contiguous(), weight.scale[:, 0].contiguous()
    )
    return with_bias(y_TO, bias_O)


def takes_int8_by_int8(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    """Of a single column torch reads memory that is not the weight's."""
    return x_TI.dtype in FLOATS and weight.facts.features[1] > 1


def int8_by_int8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    codes_OI, qparams = weight.read()
    sums_TO = torch._int_mm(served.codes_TI, codes_OI.t())
    y_TO = sums_TO.float() * served.scale * qparams.scale_OG[:, 0]
    return with_bias(y_TO, bias_O).to(x_TI.dtype)


def takes_float8(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype in FLOATS and x_TI.shape[0] > 0


def float8_by_float8(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    """A scale for each row and column: where they share one, it is repeated."""
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    activations = weight.scheme.activations
    assert activations is not None and isinstance(activations.grid, FloatGrid)
    y_TO = torch._scaled_mm(
        served.codes_TI.view(activations.grid.dtype),
        weight.codes.t(),
        served.scale.reshape(-1, 1).expand(x_TI.shape[0], 1).contiguous(),
        weight.scale.float().reshape(1, -1),
        out_dtype=torch.float32,
    )
    return with_bias(y_TO, bias_O).to(x_TI.dtype)
