"""Inputs rounded and read back in one pass, and the product by int4 weights that follows it."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from quantkernels import rounding, weight_only
from quantkernels.rounding import InputGrid, operators, reference
from torch import Tensor, nn

from quantcore.activations import fake_quantize, served_inputs
from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor
from quantcore.tensors import weight_only as products
from quantcore.tensors.kernels import KERNELS
from tests.quantized import expected, laid, linear, relative, tokens
from tests.roundings import (
    DEVICE,
    DTYPES,
    HALVES,
    HAS_TRITON,
    INF,
    NAN,
    ON_GPU,
    SHAPES,
    kernels,
    of_all_signs,
    on_nan,
)
from tests.roundings import random as drawn

GRIDS = {
    "with a zero point": InputGrid("affine", -128, 127, symmetric=False),
    "symmetric": InputGrid("affine", -128, 127),
    "int4": InputGrid("affine", -8, 7, symmetric=False),
}
EXACT = [torch.float32, *HALVES]
MOST = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}

grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
pytestmark = on_nan
if HAS_TRITON:
    from quantkernels.rounding import fused


random = partial(drawn, centre=1.0)


def same(found: Tensor, wanted: Tensor) -> bool:
    """To the bit, zeros' signs among them, but for those of a NaN."""
    pair = [torch.where(of.isnan(), 77.0, of).contiguous() for of in (found, wanted)]
    bits = [of.view(torch.uint8) for of in pair]
    return found.dtype == wanted.dtype and torch.equal(*bits)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is found."""
    monkeypatch.setattr(fused, "as_rounded", lambda x: operators.as_rounded(x).fill_(NAN))


@grids
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_read_back_are_what_the_formulas_say(grid: InputGrid, dtype: torch.dtype) -> None:
    x = random(2, 5, 48, dtype=dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    x_TI = x.double().cpu().numpy().reshape(10, 48)
    low, high = x_TI.min(axis=1, keepdims=True), x_TI.max(axis=1, keepdims=True)
    if grid.symmetric:
        high = np.maximum(-low, high)
        low = -high
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale_T1 = np.where(high > low, (high - low) / (grid.qmax - grid.qmin), 1)
    found = rounding.rounded_by_token(x, grid)
    assert found.dtype == dtype and found.shape == x.shape
    found_TI = found.double().cpu().numpy().reshape(10, 48)
    half = torch.finfo(dtype).eps / 2
    # a whole number of steps, but for a rounding to the dtype, and no farther than half a step:
    # a whole one at the ends, which a rounded zero point moves
    steps = found_TI / scale_T1
    assert (np.abs(steps - np.rint(steps)) <= np.abs(steps) * half + 1e-4).all()
    off = np.abs(found_TI - x_TI) - np.abs(found_TI) * half
    assert (off <= scale_T1 * 1.001).all()
    inside = (x_TI > low + scale_T1) & (x_TI < high - scale_T1)
    assert (off <= scale_T1 * 0.501)[inside].all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@grids
def test_what_is_not_finite_is_not_lost(grid: InputGrid, poison: float) -> None:
    x_TI = random(3, 40)
    clean_TI = rounding.rounded_by_token(x_TI, grid)
    x_TI[1, 7] = poison
    found_TI = rounding.rounded_by_token(x_TI, grid)
    assert not found_TI[1].isfinite().any()
    assert torch.equal(found_TI[[0, 2]], clean_TI[[0, 2]])


@kernels
@grids
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_is_its_reference(
    grid: InputGrid, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = of_all_signs(random(*shape, dtype=dtype))
    assert same(fused.rounded_by_token(x, grid), reference.rounded_by_token(x, grid))


@kernels
@grids
@pytest.mark.usefixtures("poisoned")
def test_rows_of_any_width_and_bits_of_any_kind(
    grid: InputGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    bits_TI = torch.randint(-(2**31), 2**31, (100, 8), generator=generator, dtype=torch.int64)
    any_TI = bits_TI.int().view(torch.float32).to(DEVICE)
    assert same(fused.rounded_by_token(any_TI, grid), reference.rounded_by_token(any_TI, grid))
    x_TI = random(5, 150)
    x_TI[1, 100], x_TI[2, 149], x_TI[3] = NAN, INF, 0.0
    for held, span in ((32, 512), (32, 16), (256, 64), (256, 16)):
        sizes = {"HELD": held, "KEPT": held, "READ": 64, "LEAST_SPAN": span}
        for name, value in sizes.items():
            monkeypatch.setattr(fused, name, value)
        assert same(fused.rounded_by_token(x_TI, grid), reference.rounded_by_token(x_TI, grid))


@kernels
@grids
@pytest.mark.usefixtures("poisoned")
def test_any_strides_and_no_tokens(grid: InputGrid) -> None:
    wide_TI = random(12, 60)
    for x_TI in (
        wide_TI[::3, 11:51:2],
        wide_TI.t(),
        wide_TI[:1].expand(7, 60),
        wide_TI.view(3, 4, 60).transpose(0, 1),
        wide_TI[:0],
        wide_TI[0],
    ):
        before = x_TI.clone()
        found = fused.rounded_by_token(x_TI, grid)
        assert same(found, reference.rounded_by_token(before, grid))
        assert found.is_contiguous() and torch.equal(x_TI, before)


@kernels
@pytest.mark.parametrize("count", [0, 3])
def test_the_operator_keeps_torchs_rules(count: int) -> None:
    args = (random(40, count).t(), *GRIDS["with a zero point"].fields)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.rounded_by_token, args, test_utils=tests)


@kernels
@pytest.mark.parametrize("name", ["int8_dynamic", "int8_dynamic_int4"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_scheme_reads_back_the_codes_that_it_serves(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, x_TI = Scheme(name=name), random(5, 64, dtype=dtype)
    assert scheme.activations is not None
    for devices in ((), (DEVICE,)):
        monkeypatch.setattr(rounding, "FUSED_DEVICES", devices)
        served = served_inputs(x_TI, scheme)
        wanted = served.values(scheme.activations).to(dtype)
        assert same(fake_quantize(x_TI, scheme), wanted)


class Net(nn.Module):
    def __init__(self, weight: QuantizedTensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias_O, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        assert isinstance(self.weight, QuantizedTensor)
        return products.multiply(x_TI, self.weight, self.bias)


def net_of(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> tuple[Net, Tensor]:
    weight = laid(linear(scheme, rows, columns), dtype, Layout.TRITON_TILED)
    bias_O = tokens(rows, dtype=dtype)
    return Net(weight, bias_O).to(DEVICE), bias_O


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of ours on whatever device there is, with the launches that are usual."""
    monkeypatch.setattr(rounding, "FUSED_DEVICES", (DEVICE,))
    monkeypatch.setattr(weight_only, "FUSED_DEVICES", (DEVICE,))
    monkeypatch.setattr(weight_only, "gpu_of", lambda _: ("a GPU without data", 4))


@kernels
@pytest.mark.parametrize("dtype", [of for of in EXACT if of in MOST], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.usefixtures("everywhere")
def test_a_product_by_kernels_is_within_rounding_of_float64(
    group_size: int | None, dtype: torch.dtype
) -> None:
    scheme = Scheme(name="int8_dynamic_int4", group_size=group_size)
    for rows, columns in ((70, 384), (5, 128), *([] if group_size else [(3, 77)])):
        net, bias_O = net_of(scheme, rows, columns, dtype)
        for count in (1, 19):
            x_TI = tokens(count, columns, dtype=dtype) + 1  # so that zero points are far from 0
            wanted = expected(x_TI, linear(scheme, rows, columns), bias_O)
            for ours in (net, copy.deepcopy(net)):
                y_TO = ours(x_TI.to(DEVICE))
                assert y_TO.dtype == dtype and relative(y_TO.cpu(), wanted) < MOST[dtype]


@kernels
@pytest.mark.usefixtures("everywhere")
def test_a_token_that_is_not_finite_spoils_its_own_row() -> None:
    net, _ = net_of(Scheme(name="int8_dynamic_int4", group_size=32), 40, 128, torch.float16)
    x_TI = random(5, 128, dtype=torch.float16)
    clean_TO = net(x_TI)
    x_TI[1, 3], x_TI[2, 127], x_TI[4, 0] = NAN, INF, -INF
    y_TO = net(x_TI)
    assert not y_TO[[1, 2, 4]].isfinite().any()
    assert torch.equal(y_TO[[0, 3]], clean_TO[[0, 3]])


@kernels
@pytest.mark.usefixtures("everywhere")
def test_a_compiled_product_is_the_eager_one() -> None:
    net, _ = net_of(Scheme(name="int8_dynamic_int4", group_size=64), 40, 128, torch.float16)
    torch._dynamo.reset()
    compiled = torch.compile(
        net, fullgraph=True, dynamic=True, backend="inductor" if ON_GPU else "aot_eager"
    )
    for count in (2, 5):
        x_TI = random(count, 128, dtype=torch.float16, seed=count)
        assert same(compiled(x_TI), net(x_TI))
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_halves_are_multiplied_by_the_kernel_and_float32_is_not(device: str) -> None:
    (kernel,) = KERNELS[device, Layout.TRITON_TILED, "int8_dynamic_int4"]
    weight = laid(linear(Scheme(name="int8_dynamic_int4"), 8, 64), torch.bfloat16, Layout.PLAIN)
    assert kernel.run is products.multiply
    taken = [kernel.takes(tokens(2, 64, dtype=dtype), weight) for dtype in DTYPES]
    assert taken == [False, True, True]


def test_a_weight_lies_as_it_does_for_inputs_that_are_not_rounded() -> None:
    ours = [
        laid(linear(Scheme(name=name, group_size=32), 40, 96), torch.bfloat16, Layout.TRITON_TILED)
        for name in ("int4", "int8_dynamic_int4")
    ]
    parts = [weight.parts() for weight in ours]
    assert parts[0].keys() == parts[1].keys() == {"codes", "scale"}
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
