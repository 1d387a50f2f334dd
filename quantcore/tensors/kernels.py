"""Which kernel multiplies by a quantized weight: one table, by device, layout and scheme.

A row names the kernels to try, in order: the first whose rule takes the shapes and dtypes at hand
runs, and where none does, the plain-torch reference. Rules look at shapes and dtypes alone, so the
same call always takes the same path. All compute

    y = (served inputs) W^T + b

and differ in where they round. The reference rounds served inputs and weights to x's dtype and
multiplies in it; in float32 for float16 on a CPU, whose own products take hundreds of times longer.

Shape suffixes: T = tokens, O = out_features, I = in_features, G = groups per row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.tensors import accelerator, cpu, w8a8, weight_only
from quantcore.tensors.layouts import Layout
from quantcore.tensors.tensor import QuantizedTensor

Takes = Callable[[Tensor, QuantizedTensor], bool]
Multiply = Callable[[Tensor, QuantizedTensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    takes: Takes  # by shapes and dtypes
    run: Multiply


def reference(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    served_TI = fake_quantize(x_TI, weight.scheme, weight.input_scale)
    w_OI = weight.read_back().to(x_TI.dtype)
    if x_TI.dtype == torch.float16 and x_TI.device.type == "cpu":
        bias_O = None if bias_O is None else bias_O.float()
        y_TO = torch.nn.functional.linear(served_TI.float(), w_OI.float(), bias_O)
        return y_TO.to(x_TI.dtype)
    return torch.nn.functional.linear(served_TI, w_OI, bias_O)


_INT4_CPU = Kernel(cpu.takes_int4, cpu.int4)
_INT4_DYNAMIC_CPU = Kernel(cpu.takes_int4_dynamic, cpu.int4_dynamic)
_INT8_CPU = Kernel(cpu.takes_int8, cpu.int8)
_INT8_BY_INT8_CPU = Kernel(cpu.takes_int8_by_int8, cpu.int8_by_int8)
_FLOAT8_CPU = Kernel(cpu.takes_float8, cpu.float8_by_float8)
_INT4_TILED = Kernel(accelerator.takes_int4, accelerator.int4)
_WEIGHT_ONLY = Kernel(weight_only.takes, weight_only.multiply)
_SPARSE_BY_INT8 = Kernel(accelerator.takes_sparse, accelerator.sparse_by_int8)
_W8A8 = Kernel(w8a8.takes, w8a8.multiply)

KERNELS: dict[tuple[str, Layout, str], tuple[Kernel, ...]] = {
    ("cpu", Layout.INT4_CPU, "int4"): (_INT4_CPU,),
    ("cpu", Layout.INT4_DYNAMIC_CPU, "int8_dynamic_int4"): (_INT4_DYNAMIC_CPU,),
    ("cpu", Layout.PLAIN, "int8"): (_INT8_CPU,),
    ("cpu", Layout.PLAIN, "int8_dynamic"): (_INT8_BY_INT8_CPU,),
    ("cpu", Layout.PLAIN, "int8_static"): (_INT8_BY_INT8_CPU,),
    ("cpu", Layout.SPARSE_24, "int8_dynamic"): (_INT8_BY_INT8_CPU,),
    ("cpu", Layout.SPARSE_24, "int8_static"): (_INT8_BY_INT8_CPU,),
    ("cpu", Layout.PLAIN, "float8_dynamic"): (_FLOAT8_CPU,),
    ("cpu", Layout.PLAIN, "float8_static"): (_FLOAT8_CPU,),
    ("cuda", Layout.TENSOR_CORE_TILED, "int4"): (_INT4_TILED,),
    ("cuda", Layout.SPARSE_24_CUDA, "int8_dynamic"): (_SPARSE_BY_INT8,),
    ("cuda", Layout.SPARSE_24_CUDA, "int8_static"): (_SPARSE_BY_INT8,),
}
for _device in ("cuda", "xpu"):  # an XPU was never at hand
    for _scheme in ("int8_dynamic", "int8_static", "float8_dynamic", "float8_static"):
        KERNELS[_device, Layout.PLAIN, _scheme] = (_W8A8,)
    for _scheme in ("int4", "int8", "float8", "int8_dynamic_int4"):
        KERNELS[_device, Layout.TRITON_TILED, _scheme] = (_WEIGHT_ONLY,)


def kernel_for(x_TI: Tensor, weight: QuantizedTensor) -> Multiply:
    key = (x_TI.device.type, weight.layout_name, weight.scheme.name)
    fast = (kernel.run for kernel in KERNELS.get(key, ()) if kernel.takes(x_TI, weight))
    return next(fast, reference)


def multiply(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    """What nn.Linear with this weight gives for rows of inputs, in x's dtype."""
    if weight.input_factor is not None:
        x_TI = (x_TI.float() / weight.input_factor).to(x_TI.dtype)
    return kernel_for(x_TI, weight)(x_TI, weight, bias_O)
