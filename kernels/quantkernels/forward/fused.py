"""RMS norm, rotary embedding, silu(gate) * up: one read of the inputs, one write of the result.

A norm's program owns one row and keeps it in registers. Its sum runs in an order that the width
alone decides (bits.py). A rotation's program owns some heads of one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.bits import NORM_VALUES_PER_WARP
from quantkernels.dependent import later_than_few, release, wait
from quantkernels.devices import on_its_device

PRODUCT_BLOCK = 2048
ROTATED_VALUES = 4096  # of one program, about
MOST_WARPS = 16


@on_its_device
def rms_norm(x: Tensor, weight_I: Tensor, eps: float, form: str) -> Tensor:
    width = x.shape[-1]
    assert len(weight_I) == width
    rows_TI = x.reshape(-1, width)
    out_TI = torch.empty(rows_TI.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
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
            **later_than_few(x.device, len(rows_TI)),
            num_warps=norm_warps(block),
        )
    return out_TI.view(x.shape)


def norm_warps(block: int) -> int:
    return max(1, min(MOST_WARPS, block // NORM_VALUES_PER_WARP))


@on_its_device
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    assert gate.shape == up.shape and gate.dtype == up.dtype
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.numel():
        return out
    # linears that were joined give parts of one result's rows
    whole = gate.is_contiguous() and up.is_contiguous()
    width = gate.numel() if whole else gate.shape[-1]
    gate_TI, up_TI = gate.reshape(-1, width), up.reshape(-1, width)
    blocks = triton.cdiv(width, PRODUCT_BLOCK)
    _silu_product[(len(gate_TI) * blocks,)](
        gate_TI,
        up_TI,
        out,
        width,
        blocks,
        *gate_TI.stride(),
        *up_TI.stride(),
        PRODUCT_BLOCK,
        **later_than_few(gate.device, len(gate_TI), blocks),
    )
    return out


@on_its_device
def rotated(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    sequences, heads, length, values = x_BHLD.shape
    assert values % 2 == 0 and cos_BLD.shape == sin_BLD.shape
    cos_BLD = cos_BLD.expand(sequences, length, values)
    sin_BLD = sin_BLD.expand(sequences, length, values)
    out_BHLD = torch.empty_like(x_BHLD)
    half = triton.next_power_of_2(values // 2)
    some = max(1, min(triton.next_power_of_2(heads), ROTATED_VALUES // (2 * half)))
    if x_BHLD.numel():
        grid = length, triton.cdiv(heads, some), sequences
        _rotated[grid](
            x_BHLD,
            cos_BLD,
            sin_BLD,
            out_BHLD,
            heads,
            values // 2,
            *x_BHLD.stride(),
            *cos_BLD.stride(),
            *sin_BLD.stride(),
            *out_BHLD.stride(),
            some,
            half,
            **later_than_few(x_BHLD.device, *grid),
            enable_fp_fusion=False,  # else a product and its sum are rounded once, not twice
        )
    return out_BHLD


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
    LATER: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(LATER)
    release(EARLY)
    row = tl.cast(tl.program_id(0), tl.int64)
    out_ptr += row * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    stored = tl.load(x_ptr + row * stride_T + column * stride_I, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column * stride_weight, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, normed(stored, weight, width, eps, OFFSET), mask=inside)


@triton.jit
def normed(stored, weight, width, eps, OFFSET: tl.constexpr):
    """A row's norm in the row's dtype; what stands past its width is 0."""
    x = stored.to(tl.float32)
    unit = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps))
    factor = 1.0 + weight if OFFSET else weight
    if not OFFSET:
        unit = unit.to(stored.dtype).to(tl.float32)
    return (unit * factor).to(stored.dtype)


@triton.jit
def _rotated(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    half,
    x_B,
    x_H,
    x_L,
    x_D,
    cos_B,
    cos_L,
    cos_D,
    sin_B,
    sin_L,
    sin_D,
    out_B,
    out_H,
    out_L,
    out_D,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LATER: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(LATER)
    release(EARLY)
    token, sequence = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    value = tl.arange(0, HALF)
    cos_ptr += sequence * cos_B + token * cos_L + value * cos_D
    sin_ptr += sequence * sin_B + token * sin_L + value * sin_D
    there = value < half
    cos_1 = tl.load(cos_ptr, mask=there, other=0.0)[None, :]
    cos_2 = tl.load(cos_ptr + half * cos_D, mask=there, other=0.0)[None, :]
    sin_1 = tl.load(sin_ptr, mask=there, other=0.0)[None, :]
    sin_2 = tl.load(sin_ptr + half * sin_D, mask=there, other=0.0)[None, :]

    inside = (head < heads)[:, None] & there[None, :]
    x_ptr += sequence * x_B + token * x_L + tl.cast(head, tl.int64)[:, None] * x_H
    out_ptr += sequence * out_B + token * out_L + tl.cast(head, tl.int64)[:, None] * out_H
    x_1 = tl.load(x_ptr + value[None, :] * x_D, mask=inside, other=0.0)
    x_2 = tl.load(x_ptr + (half + value)[None, :] * x_D, mask=inside, other=0.0)
    out_1 = _rounded_product(x_1, cos_1) + _rounded_product(-x_2, sin_1)
    out_2 = _rounded_product(x_2, cos_2) + _rounded_product(x_1, sin_2)
    tl.store(out_ptr + value[None, :] * out_D, out_1.to(x_1.dtype), mask=inside)
    tl.store(out_ptr + (half + value)[None, :] * out_D, out_2.to(x_1.dtype), mask=inside)


@triton.jit
def _rounded_product(left, right):
    return (left.to(tl.float32) * right.to(tl.float32)).to(left.dtype).to(tl.float32)


@triton.jit
def _silu_product(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    blocks,
    gate_T,
    gate_I,
    up_T,
    up_I,
    BLOCK: tl.constexpr,
    LATER: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(LATER)
    release(EARLY)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    at = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    stored = tl.load(gate_ptr + row * gate_T + at * gate_I, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_T + at * up_I, mask=inside, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + at, (silu * up).to(stored.dtype), mask=inside)
