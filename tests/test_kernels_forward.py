"""RMS norm, rotary, silu(gate) * up: the references against float64, the kernels against those."""

import importlib.util

import pytest
import torch
from quantkernels.forward import NormForm, reference, rms_norm, rotated, silu_product
from torch import Tensor

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if ON_GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # see test_kernels_fused
WIDTHS = [1, 7, 64, 576, *((4096, 12288) if ON_GPU else ())]
FORMS: list[NormForm] = ["scale", "offset"]

kernels = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
if HAS_TRITON:
    from quantkernels.forward import fused


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor, ulps: float) -> bool:
    step = torch.finfo(found.dtype).eps * wanted.double().abs()
    return bool(((found.double() - wanted.double()).abs() <= ulps * step + 1e-7).all())


def norm_in_float64(x: Tensor, weight_I: Tensor, eps: float, form: NormForm) -> Tensor:
    x, weight_I = x.double(), weight_I.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (weight_I + 1 if form == "offset" else weight_I)


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_is_what_its_formula_says(form: NormForm) -> None:
    x, weight_I = random(3, 5, 48), random(48, seed=1)
    wanted = norm_in_float64(x, weight_I, 1e-5, form)
    assert close(rms_norm(x, weight_I, 1e-5, form), wanted, ulps=8)


def test_a_gated_product_is_what_its_formula_says() -> None:
    gate, up = random(3, 40), random(3, 40, seed=1)
    wanted = gate.double() * gate.double().sigmoid() * up.double()
    assert close(silu_product(gate, up), wanted, ulps=8)


def test_a_rotation_turns_pairs_by_their_angles() -> None:
    x, angle = random(2, 3, 5, 8), 3 * random(2, 5, 4, seed=1)
    cos, sin = (torch.cat((table, table), -1) for table in (angle.cos(), angle.sin()))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    turned = pairs * torch.polar(torch.ones_like(angle.double()), angle.double())[:, None]
    assert close(rotated(x, cos, sin), torch.cat((turned.real, turned.imag), -1), ulps=8)


@kernels
@pytest.mark.parametrize("heads", [1, 3, 32, 40])
@pytest.mark.parametrize("values", [2, 10, 64, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_rotation_kernel_is_its_reference(heads: int, values: int, dtype: torch.dtype) -> None:
    x = random(2, 5, heads, values, dtype=dtype).transpose(1, 2)
    for sequences in (1, 2):
        cos = random(sequences, 5, values, dtype=dtype, seed=1)
        sin = random(sequences, 5, 2 * values, dtype=dtype, seed=2)[..., ::2]
        found = fused.rotated(x, cos, sin)
        assert torch.equal(found, reference.rotated(x, cos, sin))
        assert torch.equal(fused.rotated(x.contiguous(), cos, sin), found)
    assert fused.rotated(x[:, :, :0], cos[:, :0], sin[:, :0]).shape == (2, heads, 0, values)


@kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_norm_kernel_is_its_reference(width: int, form: NormForm, dtype: torch.dtype) -> None:
    x, weight_I = random(2, 3, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    wanted = reference.rms_norm(x, weight_I, 1e-5, form)
    assert close(fused.rms_norm(x, weight_I, 1e-5, form), wanted, ulps=2)
    assert close(fused.rms_norm(x.transpose(0, 1), weight_I, 1e-5, form), wanted.transpose(0, 1), 2)


@kernels
@pytest.mark.parametrize("count", [1, 100, 5000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_product_kernel_is_its_reference(count: int, dtype: torch.dtype) -> None:
    gate, up = 4 * random(count, dtype=dtype), random(count, dtype=dtype, seed=1)
    wanted = reference.silu_product(gate, up)
    assert close(fused.silu_product(gate, up), wanted, ulps=2)
    both = random(3, 2 * count, dtype=dtype, seed=2)
    halves = both[:, :count], both[:, count:]  # not contiguous
    assert close(fused.silu_product(*halves), reference.silu_product(*halves), ulps=2)


@kernels
def test_large_values_saturate_and_nothing_comes_of_nothing() -> None:
    gate = torch.tensor([-60000.0, -20.0, 0.0, 60000.0], device=DEVICE, dtype=torch.float16)
    found = fused.silu_product(gate, torch.ones_like(gate))
    assert close(found, reference.silu_product(gate, torch.ones_like(gate)), ulps=2)
    empty = torch.zeros(0, 64, device=DEVICE, dtype=torch.float16)
    assert fused.silu_product(empty, empty).shape == (0, 64)
    assert fused.rms_norm(empty, random(64, dtype=torch.float16), 1e-5, "scale").shape == (0, 64)
