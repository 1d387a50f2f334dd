"""Our own Triton kernels for products in the inputs' dtype: the layout triton_tiled.

They take bfloat16 and float16 and any number of tokens; what they round is said in
quantkernels/weight_only. A scheme that rounds its inputs has them rounded and read back in a pass
before, in x's dtype. On a CPU, and for float32, the same layout is made dense and multiplied.
"""

from typing import cast

from quantkernels import choice
from quantkernels import weight_only as kernels
from quantkernels.choice import Gpu
from quantkernels.launches import Codes, Launch
from quantkernels.weight_only import FUSED_DTYPES, Tiles, linear
from quantkernels.weight_only.tiles import grouping
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.affine import grid_name
from quantcore.schemes import FloatGrid, Scheme
from quantcore.tensors.tensor import QuantizedTensor


def takes(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype in FUSED_DTYPES


def multiply(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    served_TI = fake_quantize(x_TI, weight.scheme, weight.input_scale)
    return linear(served_TI, _tiles(weight), bias_O)


def launch_of(x_TI: Tensor, weight: QuantizedTensor, gpu: Gpu) -> Launch:
    """How that is launched on a GPU."""
    return choice.launch_of("weight_only", len(x_TI), _tiles(weight), gpu)


def form_of(weight: QuantizedTensor) -> tuple[object, ...]:
    """What its kernel is compiled for, beside a launch and the inputs' dtype and width."""
    tiles = _tiles(weight)
    zero = None if tiles.zero is None else tiles.zero.dtype
    return tiles.kind, tiles.grid, tiles.group, tiles.scale.dtype, zero


def compile_for(x_TI: Tensor, weight: QuantizedTensor, gpu: Gpu) -> None:
    """For that launch, which is one of ours; tensors may be without memory."""
    kernels.compile_for(x_TI, _tiles(weight), launch_of(x_TI, weight, gpu))


def _tiles(weight: QuantizedTensor) -> Tiles:
    return Tiles(
        codes_RPBW=weight.codes,
        scale=weight.scale,
        zero=weight.zero,
        kind=codes_kind(weight.scheme),
        grid=grid_name(weight.scheme),
        group=grouping(weight.scheme.group_size, zero=weight.zero is not None),
        features=weight.facts.features,
    )


def codes_kind(scheme: Scheme) -> Codes:
    return "float8" if isinstance(scheme.grid, FloatGrid) else cast(Codes, f"int{scheme.bits}")
