"""y = x W^T of inputs and weights that are both codes: W8A8 in int8 or float8.

    y = s_x s_w sum_k q_x q_w + b

Whole codes are summed in int32, exactly. float8 is summed by matrix units, 128 columns at a time,
and these sums in float32. Weights in 4 bits are multiplied by rounded inputs in `weight_only`:
their groups' scales in between cost more than units of 8 bits gain.
`fused.py` has the kernel, and `overlapped.py` that for whole codes and many tokens on Hopper.
`vendor.py` has torch's own products for the shapes that they take, used where data say that they
are faster (`quantkernels/choice.py`). `reference.py` is plain torch.
"""

from typing import Any, cast

import torch
from torch import Tensor

from quantkernels.choice import gpu_of, launch_of
from quantkernels.launches import Codes, Launch
from quantkernels.opaque import opaque
from quantkernels.operands import nothing, refuse_dtype, refuse_misfits
from quantkernels.w8a8 import reference, vendor
from quantkernels.w8a8.weight import Weight8

FUSED_DEVICES = ("cuda", "xpu")

__all__ = ["FUSED_DEVICES", "Weight8", "compile_for", "linear"]


def linear(
    codes_TI: Tensor,
    scale_T: Tensor,
    weight: Weight8,
    bias_O: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product in `dtype`, a floating one.

    `codes_TI` are int8, or float8 e4m3 in its own dtype, as the weight's kind has it. `scale_T` is
    float32, one for every token or one for all. torch.compile and CUDA graphs take it as it is.

    It has no backward. Raises ValueError for inputs or a bias that do not fit the weight.
    """
    refuse_misfits(codes_TI, weight.codes_OI, weight.features, bias_O, "codes_TI")
    codes = torch.float8_e4m3fn if weight.kind == "float8" else torch.int8
    refuse_dtype(codes_TI, "codes_TI", (codes,))
    tokens = codes_TI.shape[0]
    if scale_T.dim() and scale_T.numel() != tokens and scale_T.numel() != 1:
        raise ValueError(f"{scale_T.numel()} scales for {tokens} tokens: write one of each, or one")
    y_TO: Tensor = _linear(
        codes_TI,
        scale_T.reshape(-1),
        weight.codes_OI,
        weight.scale_O,
        bias_O,
        weight.kind,
        *weight.features,
        dtype,
    )
    return y_TO


def compile_for(
    codes_TI: Tensor,
    scale_T: Tensor,
    weight: Weight8,
    dtype: torch.dtype,
    launch: Launch,
) -> None:
    """What `linear` runs with this launch, which is one of ours; tensors may be meta ones."""
    from quantkernels.w8a8 import fused

    fused.linear(codes_TI, scale_T, weight, None, dtype, launch, compile_only=True)


def _fake(codes_TI: Tensor, *args: Any) -> Tensor:
    return codes_TI.new_empty(codes_TI.shape[0], args[5], dtype=args[7])


@opaque("quantkernels::w8a8_linear", _fake)
def _linear(  # noqa: PLR0913, PLR0917 - operators take tensors and numbers, no dataclass
    codes_TI: Tensor,
    scale_T: Tensor,
    codes_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = Weight8(
        codes_OI=codes_OI, scale_O=scale_O, kind=cast(Codes, kind), features=(rows, columns)
    )
    tokens = codes_TI.shape[0]
    if codes_TI.device.type not in FUSED_DEVICES:
        return reference.linear(codes_TI, scale_T, weight, bias_O, dtype)
    if 0 in (tokens, rows, columns):
        return nothing(codes_TI, rows, bias_O, dtype)
    launch = launch_of("w8a8", tokens, weight, gpu_of(codes_TI.device))
    if launch.other and vendor.takes(codes_TI, weight, dtype):
        return vendor.linear(codes_TI, scale_T, weight, bias_O, dtype)
    from quantkernels.w8a8 import fused

    return fused.linear(codes_TI, scale_T, weight, bias_O, dtype, launch)
