"""The kernels that linear_gpu.py times: what a row of its table is, bfloat16's, and ours.

A row builds a linear from a bfloat16 weight and tells which values that linear now stands for. Ours
go through the project's own API: nn.Linear whose weight quantize_ has made a QuantizedTensor.

Shape suffixes: T = tokens, O = out_features, I = in_features, G = groups per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantcore.autoquant.candidates import Candidate
from quantcore.quantize import quantize_
from quantcore.schemes import resolve_scheme
from quantcore.tensors import Layout, QuantizedTensor

# How a kernel rounds its inputs, for float64 to do the same
Served = Literal[
    "as they are",
    "int8, per token",
    "int8 with a zero point, per token",
    "float8, per token",
    "float8, per tensor",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    multiply: Callable[[Tensor], Tensor]  # copy.deepcopy gives another, elsewhere in memory
    values_OI: Tensor  # float32: what the codes stand for
    num_bytes: int  # of codes, scales and zero points


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    by: str
    scheme: str
    build: Callable[[Tensor], Built]
    served: Served = "as they are"
    devices: tuple[str, ...] = ("cuda",)
    candidate: Candidate | None = None  # ours: what can be compiled ahead

    @property
    def label(self) -> str:
        return f"{self.by} {self.scheme}"


def _bf16(w_OI: Tensor) -> Built:
    return Built(
        multiply=partial(product, weight=w_OI.clone()),
        values_OI=w_OI.float(),
        num_bytes=num_bytes(w_OI),
    )


def _ours(
    label: str, name: str, layout: Layout, group_size: int | str | None = None, **more: Any
) -> Kernel:
    def build(w_OI: Tensor) -> Built:
        module = _quantized(w_OI, name, layout, group_size)
        plain = _quantized(w_OI, name, Layout.PLAIN, group_size)
        assert isinstance(module.weight, QuantizedTensor)
        assert isinstance(plain.weight, QuantizedTensor)
        return Built(
            multiply=module,
            values_OI=plain.weight.read_back(),
            num_bytes=module.weight.num_bytes(),
        )

    candidate = Candidate(scheme=resolve_scheme(name, group_size), layout=layout)
    devices = ("cuda", "cpu")
    return Kernel(
        by="ours", scheme=label, build=build, devices=devices, candidate=candidate, **more
    )


def _quantized(
    w_OI: Tensor, scheme: str, layout: Layout, group_size: int | str | None
) -> nn.Linear:
    rows, columns = w_OI.shape
    module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = nn.Parameter(w_OI, requires_grad=False)
    quantize_(module, scheme, group_size=group_size, layout=layout, inductor_settings=False)
    return module


BF16 = Kernel(by="torch", scheme="bf16", build=_bf16, devices=("cuda", "cpu"))

_TILED, _PLAIN = Layout.TRITON_TILED, Layout.PLAIN
OURS = [
    _ours("int4 g128", "int4", _TILED, 128),
    _ours("int4 g64", "int4", _TILED, 64),
    _ours("int8", "int8", _TILED),
    _ours("float8", "float8", _TILED),
    _ours("int8 dynamic", "int8_dynamic", _PLAIN, served="int8, per token"),
    _ours("float8 dynamic row", "float8_dynamic", _PLAIN, "channel", served="float8, per token"),
    _ours("float8 dynamic tensor", "float8_dynamic", _PLAIN, "tensor", served="float8, per tensor"),
    _ours(
        "int8 dynamic int4", "int8_dynamic_int4", _TILED, served="int8 with a zero point, per token"
    ),
]


def named(words: Sequence[str] | None, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those with one of the words in their names; all, where none is asked for."""
    found = [of for of in kernels if not words or any(word in of.label for word in words)]
    if words and not found:
        every = ", ".join(kernel.label for kernel in kernels)
        raise SystemExit(f"--kernels: none has such a name: write a part of one of {every}")
    return found


def product(x_TI: Tensor, weight: Any) -> Tensor:
    return linear(x_TI, weight)


@cache
def compiled_product(mode: str) -> Callable[[Tensor, Any], Tensor]:
    """For every weight of a kind and number of tokens a program of its own: none is left eager."""
    torch._dynamo.config.recompile_limit = 1 << 20
    torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    return torch.compile(product, mode=mode, dynamic=False, fullgraph=True)


def compiled(x_TI: Tensor, weight: Any, mode: str) -> Tensor:
    return compiled_product(mode)(x_TI, weight)


def under_compile(kernel: Kernel, mode: str) -> Kernel:
    """The same row, its product compiled: what is around torch's own kernels is fused."""

    def build(w_OI: Tensor) -> Built:
        built = kernel.build(w_OI)
        assert isinstance(built.multiply, nn.Linear)
        multiply = partial(compiled, weight=built.multiply.weight, mode=mode)
        return Built(multiply=multiply, values_OI=built.values_OI, num_bytes=built.num_bytes)

    return Kernel(
        by="ours compiled",
        scheme=kernel.scheme,
        build=build,
        served=kernel.served,
        devices=kernel.devices,
    )


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def served(x_TI: Tensor, how: Served) -> Tensor:
    """Inputs, float64, rounded as a kernel rounds them."""
    x_TI = x_TI.double()
    if how == "as they are":
        return x_TI
    if how == "int8 with a zero point, per token":
        low, high = x_TI.amin(-1, True).clamp(max=0), x_TI.amax(-1, True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        return (((x_TI / scale).round() + zero).clamp(-128, 127) - zero) * scale
    largest = x_TI.abs().amax(-1, keepdim=True) if "token" in how else x_TI.abs().amax()
    if how == "int8, per token":  # max|x| over half of 255 steps
        scale = largest * 2 / 255
        return (x_TI / scale).round().clamp(-128, 127) * scale
    grid = torch.float8_e4m3fn
    scale = largest / torch.finfo(grid).max
    return (x_TI / scale).float().to(grid).double() * scale
