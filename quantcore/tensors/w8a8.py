"""Products of codes by codes on CUDA and XPU: the 8-bit schemes that round their inputs.

By our own kernel or by torch's, as quantkernels/w8a8 has it, for the layout plain. Integer products
are exact, and scaled in float32. float8's are summed by matrix units, which keep fewer bits than
float32: a float32 model is multiplied otherwise. Any shape, any of three floating dtypes.
"""

import torch
from quantkernels import choice
from quantkernels import w8a8 as kernels
from quantkernels.choice import Gpu
from quantkernels.devices import capability
from quantkernels.launches import Launch
from quantkernels.w8a8 import Weight8, linear
from quantkernels.weight_only import FUSED_DTYPES
from torch import Tensor

from quantcore.activations import served_inputs
from quantcore.schemes import FloatGrid
from quantcore.tensors.cpu import FLOATS
from quantcore.tensors.tensor import QuantizedTensor
from quantcore.tensors.weight_only import codes_kind


def takes(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    activations = weight.scheme.activations
    if activations is not None and isinstance(activations.grid, FloatGrid):
        # GPUs before these have no float8
        known = x_TI.device.type != "cuda" or capability(x_TI.device) >= (8, 9)
        return known and x_TI.dtype in FUSED_DTYPES
    return x_TI.dtype in FLOATS


def multiply(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    activations = weight.scheme.activations
    assert activations is not None
    served = served_inputs(x_TI, weight.scheme, weight.input_scale)
    codes_TI = served.codes_TI
    if isinstance(activations.grid, FloatGrid):
        codes_TI = codes_TI.view(activations.grid.dtype)
    return linear(codes_TI, served.scale, _weight(weight), bias_O, x_TI.dtype)


def launch_of(x_TI: Tensor, weight: QuantizedTensor, gpu: Gpu) -> Launch:
    """How that is launched on a GPU."""
    return choice.launch_of("w8a8", len(x_TI), _weight(weight), gpu)


def form_of(weight: QuantizedTensor) -> tuple[object, ...]:
    """What its kernel is compiled for, beside a launch and the inputs' dtype and width."""
    return codes_kind(weight.scheme), _by_token(weight)


def compile_for(x_TI: Tensor, weight: QuantizedTensor, gpu: Gpu) -> None:
    """For that launch, which is one of ours; tensors may be without memory."""
    activations = weight.scheme.activations
    assert activations is not None
    floats = isinstance(activations.grid, FloatGrid)
    codes_TI = torch.empty_like(x_TI, dtype=torch.float8_e4m3fn if floats else torch.int8)
    scale_T = x_TI.new_empty(len(x_TI) if _by_token(weight) else 1, dtype=torch.float32)
    launch = launch_of(x_TI, weight, gpu)
    kernels.compile_for(codes_TI, scale_T, _weight(weight), x_TI.dtype, launch)


def _by_token(weight: QuantizedTensor) -> bool:
    return weight.input_scale is None and not weight.scheme.per_tensor


def _weight(weight: QuantizedTensor) -> Weight8:
    return Weight8(
        codes_OI=weight.codes,
        scale_O=weight.scale.reshape(-1),
        kind=codes_kind(weight.scheme),
        features=weight.facts.features,
    )
