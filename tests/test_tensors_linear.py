"""A linear with a quantized weight against float64: every scheme, layout, dtype and odd shape."""

import pytest
import torch
from torch import Tensor, nn

from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor, cpu, kernels
from quantcore.tensors.kernels import kernel_for, reference
from tests.quantized import FORMS, expected, laid, layouts_of, linear, relative, tokens

# what a few roundings to the dtype, of inputs, weights and outputs, may come to
MOST = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1.2e-3}
CASES = [
    pytest.param(scheme, layout, dtype, id=f"{scheme.label()} {layout} {str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16)
    for scheme in FORMS
    for layout in layouts_of(scheme, dtype)
]
INT4 = Scheme(name="int4", group_size=32)


def module(weight: QuantizedTensor, bias_O: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias_O is None else nn.Parameter(bias_O)
    return made


@pytest.mark.parametrize(("scheme", "layout", "dtype"), CASES)
def test_a_linear_is_within_rounding_of_float64(
    scheme: Scheme, layout: Layout, dtype: torch.dtype
) -> None:
    ours = linear(scheme, 32, 64, factor=True, sparse=layout == Layout.SPARSE_24)
    bias_O = tokens(32, dtype=dtype)
    served = module(laid(ours, dtype, layout), bias_O)
    x_BTI = tokens(2, 5, 64, dtype=dtype)
    # the factor is divided by before inputs are rounded, and what is divided has x's dtype
    assert ours.input_factor_I is not None
    smooth_BTI = (x_BTI.float() / ours.input_factor_I).to(dtype).float() * ours.input_factor_I
    y_BTO = served(x_BTI)
    assert y_BTO.dtype == dtype
    assert relative(y_BTO, expected(smooth_BTI, ours, bias_O)) < MOST[dtype]


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_inputs_of_any_shape_and_strides(scheme: Scheme) -> None:
    for layout in layouts_of(scheme, torch.float32):
        ours = linear(scheme, 32, 64, sparse=layout == Layout.SPARSE_24)
        served = module(laid(ours, torch.float32, layout), None)
        turned = tokens(5, 2, 64, dtype=torch.float32).transpose(0, 1)
        strided = tokens(3, 64, dtype=torch.float32).repeat_interleave(2, 1)[:, ::2]
        for x in (
            tokens(64, dtype=torch.float32),
            tokens(1, 64, dtype=torch.float32),
            tokens(40, 64, dtype=torch.float32),
            tokens(2, 1, 3, 64, dtype=torch.float32),
            turned,
            strided,
            torch.zeros(2, 64),
        ):
            assert relative(served(x), expected(x, ours, None)) < MOST[torch.float32], layout
        for empty in (torch.zeros(0, 64), torch.zeros(2, 0, 64)):
            assert served(empty).shape == (*empty.shape[:-1], 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 1), (1, 33), (17, 7), (5, 48), (1, 64)])
@pytest.mark.parametrize(
    "scheme", [form for form in FORMS if form.group_size is None], ids=Scheme.label
)
def test_weights_of_odd_shapes(scheme: Scheme, rows: int, width: int, dtype: torch.dtype) -> None:
    ours = linear(scheme, rows, width, stored=dtype)
    bias_O = tokens(rows, dtype=dtype)
    x_TI = tokens(3, width, dtype=dtype)
    y_TO = module(QuantizedTensor.of(ours, dtype), bias_O)(x_TI)
    assert relative(y_TO, expected(x_TI, ours, bias_O)) < 2 * MOST[dtype]


def test_matmul_mm_and_addmm_are_the_same_product() -> None:
    ours = linear(INT4, 32, 64)
    weight, bias_O = QuantizedTensor.of(ours, torch.float32), tokens(32, dtype=torch.float32)
    x_TI = tokens(5, 64, dtype=torch.float32)
    x_BTI = tokens(2, 5, 64, dtype=torch.float32)
    wanted = expected(x_TI, ours, None)
    assert relative(torch.mm(x_TI, weight.t()), wanted) < 2e-6
    assert relative(x_TI @ weight.transpose(0, 1), wanted) < 2e-6
    assert relative(torch.matmul(x_BTI, weight.t()), expected(x_BTI, ours, None)) < 2e-6
    assert relative(torch.addmm(bias_O, x_TI, weight.t()), expected(x_TI, ours, bias_O)) < 2e-6
    scaled = torch.addmm(bias_O, x_TI, weight.t(), beta=0.5, alpha=2)
    assert relative(scaled, 2 * wanted + 0.5 * bias_O.double().numpy()) < 2e-6
    with torch.inference_mode():
        assert relative(nn.functional.linear(x_BTI, weight), expected(x_BTI, ours, None)) < 2e-6
    for other in (lambda: tokens(3, 32, dtype=torch.float32) @ weight, lambda: weight @ x_TI.t()):
        with pytest.raises(NotImplementedError, match="write"):
            other()


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_on_the_meta_device_shapes_are_known(scheme: Scheme) -> None:
    weight = QuantizedTensor.of(linear(scheme, 32, 64), torch.bfloat16).to("meta")
    x_BTI = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta")
    y_BTO = module(weight, None)(x_BTI)
    assert (y_BTO.shape, y_BTO.dtype, y_BTO.is_meta) == ((2, 5, 32), torch.bfloat16, True)


def test_inputs_that_need_gradients_pass_through() -> None:
    """Embeddings of a loaded model need them, and nobody asks for any."""
    ours = linear(INT4, 32, 64)
    x_TI = tokens(5, 64, dtype=torch.float32).requires_grad_()
    weight = QuantizedTensor.of(ours, torch.float32)
    y_TO = module(weight, None)(x_TI)
    assert relative(y_TO.detach(), expected(x_TI.detach(), ours, None)) < 2e-6
    y_TO.sum().backward()
    w_OI = weight.dequantize().double()
    assert relative(x_TI.grad, w_OI.sum(0).expand(5, 64).numpy()) < 2e-6
    assert weight.grad is None


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_the_short_way_to_a_product_gives_the_bits_of_the_long_one(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one is torch's dispatcher, which is taken where gradients are or autocast is."""
    ours = linear(scheme, 32, 64)
    served = module(QuantizedTensor.of(ours, torch.bfloat16), tokens(32, dtype=torch.bfloat16))
    x_BTI = tokens(2, 5, 64, dtype=torch.bfloat16)
    long = [served(x_BTI.clone().requires_grad_()).detach()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        long.append(served(x_BTI))
    monkeypatch.setattr("quantcore.tensors.operators.OPERATORS", {})
    short = served(x_BTI)
    assert all(torch.equal(short, y_BTO) for y_BTO in long)


@pytest.mark.parametrize(
    ("name", "layout", "width", "dtype", "run"),
    [
        ("int4", Layout.INT4_CPU, 64, torch.bfloat16, cpu.int4),
        ("int4", Layout.PLAIN, 64, torch.float32, reference),
        ("int4", Layout.TENSOR_CORE_TILED, 64, torch.bfloat16, reference),
        ("int8", Layout.PLAIN, 64, torch.bfloat16, cpu.int8),
        ("int8", Layout.PLAIN, 48, torch.bfloat16, reference),
        ("int8", Layout.PLAIN, 64, torch.float32, reference),
        ("int8_dynamic", Layout.PLAIN, 7, torch.float32, cpu.int8_by_int8),
        ("int8_static", Layout.SPARSE_24, 64, torch.float32, cpu.int8_by_int8),
        ("float8", Layout.PLAIN, 64, torch.float32, reference),
        ("float8_dynamic", Layout.PLAIN, 64, torch.float32, cpu.float8_by_float8),
        ("int8_dynamic_int4", Layout.INT4_DYNAMIC_CPU, 64, torch.float32, cpu.int4_dynamic),
        ("int8_dynamic_int4", Layout.PLAIN, 64, torch.bfloat16, reference),
    ],
)
def test_shapes_and_dtypes_choose_the_kernel(
    name: str, layout: Layout, width: int, dtype: torch.dtype, run: kernels.Multiply
) -> None:
    scheme = Scheme(name=name, group_size=32 if name == "int4" else None)
    ours = linear(scheme, 32, width, sparse=layout == Layout.SPARSE_24)
    chosen = kernel_for(tokens(2, width, dtype=dtype), laid(ours, dtype, layout))
    assert chosen is run


def test_any_scheme_stands_beside_any_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in FORMS))
    x_TI = tokens(6, 32, dtype=torch.float32)
    wanted = x_TI
    for module_, scheme in zip(model, FORMS, strict=True):
        assert isinstance(module_, nn.Linear)
        ours = linear(scheme, 32, 32)
        module_.weight = nn.Parameter(QuantizedTensor.of(ours, torch.float32), requires_grad=False)
        wanted = module_(wanted) / 8
        module_.register_forward_hook(lambda _module, _args, output: output / 8)
    assert torch.equal(model(x_TI), wanted)
    assert wanted.isfinite().all()
