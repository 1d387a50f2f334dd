"""Our own Triton kernels for weights whose inputs are not rounded: the layout triton_tiled.

They take bfloat16 and float16 and any number of tokens; what they round is said in
quantkernels/weight_only. On a CPU the same layout is made dense and multiplied.
"""

from typing import cast

from quantkernels.launches import Codes
from quantkernels.weight_only import FUSED_DTYPES, Tiles, linear
from quantkernels.weight_only.tiles import grouping
from torch import Tensor

from quantcore.affine import grid_name
from quantcore.schemes import FloatGrid, Scheme
from quantcore.tensors.tensor import QuantizedTensor


def takes(x_TI: Tensor, weight: QuantizedTensor) -> bool:
    return x_TI.dtype in FUSED_DTYPES


def multiply(x_TI: Tensor, weight: QuantizedTensor, bias_O: Tensor | None) -> Tensor:
    tiles = Tiles(
        codes_RPBW=weight.codes,
        scale=weight.scale,
        zero=weight.zero,
        kind=codes_kind(weight.scheme),
        grid=grid_name(weight.scheme),
        group=grouping(weight.scheme.group_size, zero=weight.zero is not None),
        features=weight.facts.features,
    )
    return linear(x_TI, tiles, bias_O)


def codes_kind(scheme: Scheme) -> Codes:
    return "float8" if isinstance(scheme.grid, FloatGrid) else cast(Codes, f"int{scheme.bits}")
