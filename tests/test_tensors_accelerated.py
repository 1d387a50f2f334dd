"""Quantized linears as they run on an accelerator, in Triton's interpreter: the whole way there.

An XPU was never at hand. It takes the same rows of the table, and so the same kernels; here a CPU
takes them as well, in float16, since the interpreter multiplies bfloat16 wrongly, and float8 not
at all.
"""

import importlib.util

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from quantcore.schemes import Scheme
from quantcore.tensors import Layout, kernels
from quantcore.tensors.kernels import KERNELS, kernel_for
from quantcore.tensors.w8a8 import multiply as by_codes
from quantcore.tensors.weight_only import multiply as by_values
from tests.quantized import FORMS, expected, laid, linear, relative, tokens

HAS_TRITON = importlib.util.find_spec("triton") is not None
OURS = (by_values, by_codes)
XPU = {
    (layout, scheme): rows for (device, layout, scheme), rows in KERNELS.items() if device == "xpu"
}
CASES = [
    pytest.param(scheme, layout, id=f"{scheme.label()} {layout}")
    for scheme in FORMS
    for layout in (Layout.PLAIN, Layout.TRITON_TILED)
    if (layout, scheme.name) in XPU and not scheme.name.startswith("float8_")
]


def test_an_xpu_takes_the_kernels_of_ours_that_cuda_takes() -> None:
    cuda = {key[1:]: rows for key, rows in KERNELS.items() if key[0] == "cuda"}
    assert {key: rows for key, rows in cuda.items() if rows[0].run in OURS} == XPU


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("weight_only", "w8a8", "rounding"):
        monkeypatch.setattr(f"quantkernels.{name}.FUSED_DEVICES", ("cpu",))
    for name in ("weight_only", "w8a8"):
        monkeypatch.setattr(f"quantkernels.{name}.gpu_of", lambda _: ("no name that is known", 16))
    table = {("cpu", *key): rows for key, rows in XPU.items()}
    monkeypatch.setattr(kernels, "KERNELS", table)


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton, and no GPU: it interprets"
)
@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_a_linear_is_within_rounding_of_float64(scheme: Scheme, layout: Layout) -> None:
    """Of two blocks of rows, and columns that fill an odd number of tiles."""
    ours = linear(scheme, 140, 352, stored=torch.float16, factor=True)
    assert ours.input_factor_I is not None
    served = nn.Linear(352, 140, device="meta")
    bias_O = tokens(140, dtype=torch.float16)
    weight = laid(ours, torch.float16, layout)
    served.weight = nn.Parameter(weight, requires_grad=False)
    served.bias = nn.Parameter(bias_O, requires_grad=False)
    for x in (tokens(2, 3, 352, dtype=torch.float16), tokens(352, 3, dtype=torch.float16).t()):
        assert kernel_for(x, weight) in OURS
        smooth = (x.float() / ours.input_factor_I).half().float() * ours.input_factor_I
        assert relative(served(x), expected(smooth, ours, bias_O)) < 2.5e-3
    assert served(torch.zeros(0, 352, dtype=torch.float16)).shape == (0, 140)


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton, and no GPU: it interprets"
)
@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("name", ["int8_dynamic", "int8_dynamic_int4"])
def test_any_number_of_tokens_is_one_program_without_a_break(name: str) -> None:
    layout = Layout.PLAIN if name == "int8_dynamic" else Layout.TRITON_TILED
    scheme = Scheme(name=name, group_size=None if name == "int8_dynamic" else 32)
    served = nn.Linear(96, 16, bias=False, device="meta")
    ours = linear(scheme, 16, 96, stored=torch.float16)
    served.weight = nn.Parameter(laid(ours, torch.float16, layout), requires_grad=False)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(served, fullgraph=True, backend=counted)
    with torch.no_grad():
        for shape in ((4, 6, 96), (3, 5, 96), (2, 9, 96)):
            x_BTI = tokens(*shape, dtype=torch.float16)
            for dimension in (0, 1):
                torch._dynamo.mark_dynamic(x_BTI, dimension)
            assert torch.equal(compiled(x_BTI), served(x_BTI))
    assert counted.frame_count == 1
    torch._dynamo.reset()
