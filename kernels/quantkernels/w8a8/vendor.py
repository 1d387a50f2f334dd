"""torch's own products of 8-bit codes, for the shapes and dtypes that each is right for.

Integer products are exact, and scaled in float32; float8 products are scaled as they leave float32.
"""

import torch
from torch import Tensor

from quantkernels.w8a8.weight import Weight8

_LEAST_ROWS = 32  # cuBLAS multiplies 17 rows of bytes or more


def takes(codes_TI: Tensor, weight: Weight8, dtype: torch.dtype) -> bool:
    rows, columns = weight.features
    if codes_TI.device.type != "cuda":  # an XPU's were never tried
        return False
    if weight.kind == "int8":
        return rows % 8 == 0 and columns % 8 == 0
    # ROCm, which calls itself CUDA, has another float8
    fits = rows % 16 == 0 and columns % 16 == 0
    return fits and dtype == torch.bfloat16 and torch.version.hip is None


def linear(
    codes_TI: Tensor, scale_T: Tensor, weight: Weight8, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    tokens = codes_TI.shape[0]
    scale_O = weight.scale_O.float()
    if weight.kind == "int8":
        padded_TI = torch.nn.functional.pad(codes_TI, (0, 0, 0, max(0, _LEAST_ROWS - tokens)))
        sums_TO = torch._int_mm(padded_TI.contiguous(), weight.codes_OI.contiguous().t())[:tokens]
        y_TO = sums_TO.float() * scale_O * scale_T[:, None]
        return (y_TO if bias_O is None else y_TO + bias_O.float()).to(dtype)
    y_TO = torch._scaled_mm(
        codes_TI.contiguous(),
        weight.codes_OI.contiguous().t(),
        scale_T[:, None].expand(tokens, 1).contiguous(),
        scale_O[None, :].contiguous(),
        out_dtype=dtype,
    )
    return y_TO if bias_O is None else (y_TO + bias_O).to(dtype)
