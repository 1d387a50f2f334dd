"""y = x W^T by a weight in 4 or 8 bits, whose values x's dtype multiplies (W4A16, W8A16).

    Frantar et al. 2024, https://arxiv.org/abs/2408.11743, for why such a product can be as fast as
    its bytes are read; what is ours is in `tiles.py` (how a weight lies), `unpack.py` (codes to
    values), `fused.py` (the product) and `overlapped.py` (for many tokens, on Hopper).
    `reference.py` is plain torch.

One entry for any number of tokens. On an accelerator the tiles are read, or the weight is made
dense, a piece of memory that is given back, and multiplied by torch's own product. Which it is, and
how the kernel is launched, is data (`quantkernels/choice.py`).
"""

from typing import Any, cast

import torch
from torch import Tensor

from quantkernels.choice import gpu_of, launch_of
from quantkernels.grids import GridName
from quantkernels.launches import Codes, Launch
from quantkernels.opaque import opaque
from quantkernels.operands import nothing, refuse_dtype, refuse_misfits
from quantkernels.weight_only import reference, tiles
from quantkernels.weight_only.tiles import Tiles

FUSED_DEVICES = ("cuda", "xpu")
FUSED_DTYPES = (torch.bfloat16, torch.float16)

__all__ = [
    "FUSED_DEVICES",
    "FUSED_DTYPES",
    "Tiles",
    "compile_for",
    "dense",
    "linear",
    "pack",
]


def linear(x_TI: Tensor, weight: Tiles, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype: bfloat16 or float16 on an accelerator, elsewhere any.

    Sums run in float32. A weight's value is its code times its scale, the product rounded to x's
    dtype at most once; where the launch scales sums instead, not at all. Scales of groups whose
    values are scaled, and float zero points, are read in x's dtype, in which artifacts have them.
    `x_TI` has any strides and any number of rows, none among them; the bias any floating dtype.
    torch.compile and CUDA graphs take it as it is.

    It has no backward. Raises ValueError for inputs or a bias that do not fit the weight.
    """
    refuse_misfits(x_TI, weight.codes_RPBW, weight.features, bias_O)
    if x_TI.device.type in FUSED_DEVICES:
        refuse_dtype(x_TI, "x", FUSED_DTYPES)
    y_TO: Tensor = _linear(
        x_TI,
        weight.codes_RPBW,
        weight.scale,
        weight.zero,
        bias_O,
        weight.kind,
        weight.grid,
        weight.group,
        *weight.features,
    )
    return y_TO


def compile_for(x_TI: Tensor, weight: Tiles, launch: Launch) -> None:
    """What `linear` runs with this launch, which is one of ours; tensors may be meta ones."""
    from quantkernels.weight_only import fused

    fused.linear(x_TI, weight, None, launch, compile_only=True)


def dense(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """The weight's values (O, I), each rounded to the dtype."""
    if weight.codes_RPBW.device.type in FUSED_DEVICES and dtype in FUSED_DTYPES:
        from quantkernels.weight_only import fused

        return fused.dense(weight, dtype)
    return reference.dense(weight, dtype)


def pack(codes_OI: Tensor, kind: Codes) -> Tensor:
    """int8 codes, or the bits of float8, as `Tiles.codes_RPBW`."""
    if codes_OI.device.type in FUSED_DEVICES:
        from quantkernels.weight_only import fused

        return fused.pack_codes(codes_OI, kind)
    return tiles.pack_codes(codes_OI, kind)


def _fake(x_TI: Tensor, *args: Any) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], args[7])


@opaque("quantkernels::weight_only_linear", _fake)
def _linear(  # noqa: PLR0913, PLR0917 - operators take tensors and numbers, no dataclass
    x_TI: Tensor,
    codes_RPBW: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_O: Tensor | None,
    kind: str,
    grid: str,
    group: int,
    rows: int,
    columns: int,
) -> Tensor:
    weight = Tiles(
        codes_RPBW=codes_RPBW,
        scale=scale,
        zero=zero,
        kind=cast(Codes, kind),
        grid=cast(GridName, grid),
        group=group,
        features=(rows, columns),
    )
    if x_TI.device.type not in FUSED_DEVICES:
        return reference.linear(x_TI, weight, bias_O)
    from quantkernels.weight_only import fused

    tokens = x_TI.shape[0]
    if 0 in (tokens, rows, columns):
        return nothing(x_TI, rows, bias_O, x_TI.dtype)
    launch = launch_of("weight_only", tokens, weight, gpu_of(x_TI.device))
    if launch.other:
        bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, fused.dense(weight, x_TI.dtype), bias_O)
    return fused.linear(x_TI, weight, bias_O, launch)
