"""RMS norm, and silu(gate) * up: one read of the inputs, one write of the result.

A norm's program owns one row and keeps it in registers. Its sum runs in an order that the width
alone decides (bits.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.bits import NORM_VALUES_PER_WARP

PRODUCT_BLOCK = 2048
MOST_WARPS = 16


def rms_norm(x: Tensor, weight_I: Tensor, eps: float, form: str) -> Tensor:
    width = x.shape[-1]
    assert len(weight_I) == width
    rows_TI = x.reshape(-1, width)
    out_TI = torch.empty(rows_TI.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    warps = max(1, min(MOST_WARPS, block // NORM_VALUES_PER_WARP))
    if len(rows_TI):
        _rms_norm[(len(rows_TI),)](
            rows_TI,
            weight_I,
            out_TI,
            width,
            eps,
            *rows_TI.stride(),
            weight_I.stride(0),
            form == "offset",
            block,
            num_warps=warps,
        )
    return out_TI.view(x.shape)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    assert gate.shape == up.shape and gate.dtype == up.dtype
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        programs = triton.cdiv(gate.numel(), PRODUCT_BLOCK)
        _silu_product[(programs,)](gate, up, out, gate.numel(), PRODUCT_BLOCK)
    return out


@triton.jit
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    width,
    eps,
    stride_T,
    stride_I,
    stride_weight,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    out_ptr += row * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    stored = tl.load(x_ptr + row * stride_T + column * stride_I, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column * stride_weight, mask=inside, other=0.0).to(tl.float32)
    x = stored.to(tl.float32)
    normed = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps))
    if OFFSET:
        tl.store(out_ptr + column, (normed * (1.0 + weight)).to(stored.dtype), mask=inside)
    else:
        rounded = normed.to(stored.dtype).to(tl.float32)
        tl.store(out_ptr + column, (rounded * weight).to(stored.dtype), mask=inside)


@triton.jit
def _silu_product(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stored = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype).to(tl.float32)
    tl.store(out_ptr + at, (silu * up).to(stored.dtype), mask=inside)
