"""A module's linears quantized in place: every method, what is picked, and what is refused."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore import inductor
from quantcore.affine import dequantize
from quantcore.errors import QuantizationError
from quantcore.formats.base import QuantizedLinear
from quantcore.gptq import GptqConfig
from quantcore.methods import METHODS, Options
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder
from quantcore.schemes import IntegerGrid, Scheme
from quantcore.tensors import Layout, QuantizedTensor, pruned_24
from tests.quantized import FORMS
from tests.references import correlated_inputs, naive_gptq, output_error, second_moment, spread

WIDTH, INNER = 64, 96


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, INNER)
        self.k_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.o_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x_TI: Tensor) -> Tensor:
        x_TI = self.norm(x_TI)
        y_TI: Tensor = self.o_proj(self.q_proj(x_TI).relu() + self.k_proj(x_TI))
        return y_TI


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    made = Layer()
    with torch.no_grad():
        made.norm.weight[[3, 17]] *= 30  # a few loud channels, as every large model has some
    return made.requires_grad_(False)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inductor, "_applied", [True])
    yield


def examples() -> Tensor:
    return correlated_inputs(400, WIDTH, seed=1)


def recorded(layer: nn.Module) -> Recorder:
    recorder = Recorder(layer)
    with recorder, torch.no_grad():
        for x_TI in examples().split(100):
            layer(x_TI)
    return recorder


def error(layer: nn.Module, before: nn.Module) -> float:
    with torch.no_grad():
        wanted = before(examples())
        return float((layer(examples()) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
@pytest.mark.parametrize("method", METHODS)
def test_every_scheme_by_every_method(scheme: Scheme, method: str, layer: Layer) -> None:
    before = copy.deepcopy(layer)
    if METHODS[method].activations and scheme.activations is None:
        with pytest.raises(QuantizationError, match="write a scheme that rounds"):
            quantize_(layer, scheme, method=method)
        return
    if METHODS[method].integers and not isinstance(scheme.grid, IntegerGrid):
        with pytest.raises(QuantizationError, match="hqq fits integer grids"):
            quantize_(layer, scheme, method=method)
        return
    done = quantize_(layer, scheme, method=method, recorder=recorded(layer))
    assert done == ["q_proj", "k_proj", "o_proj"]
    for name in done:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert weight.scheme == scheme
        assert not weight.requires_grad
    assert 0 < error(layer, before) < (0.3 if scheme.bits == 4 else 0.1)


def test_one_line_quantizes_a_model(layer: Layer) -> None:
    quantize_(layer, "int4", group_size=32)
    assert layer.q_proj.weight.scheme == Scheme(name="int4", group_size=32)  # type: ignore[union-attr]
    assert repr(layer.q_proj) == "Linear(in_features=64, out_features=96, bias=True)"


def test_a_filter_picks_and_the_rest_may_have_another_scheme(layer: Layer) -> None:
    layer.bfloat16()
    assert quantize_(layer, "int8", lambda name, _: name == "o_proj") == ["o_proj"]
    assert type(layer.q_proj.weight) is nn.Parameter
    rest = quantize_(layer, "int4", group_size=32, zero_point="float", layout="int4_cpu")
    assert rest == ["q_proj", "k_proj"]
    labels = [m.weight.scheme.label() for m in (layer.q_proj, layer.o_proj)]  # type: ignore[union-attr]
    assert labels == ["int4 float-zero g32", "int8 sym channel"]
    assert layer.q_proj.weight.layout_name == Layout.INT4_CPU  # type: ignore[union-attr]


def test_logits_stay_unless_a_filter_names_their_linear() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 50)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert quantize_(Language(), "int8") == ["body"]
    assert quantize_(Language(), "int8", lambda name, _: name == "head") == ["head"]


@pytest.mark.parametrize("search", [True, False])
def test_gptq_is_the_textbooks(search: bool, layer: Layer) -> None:
    recorder = recorded(layer)
    w_OI = layer.k_proj.weight.double().numpy()
    h_II = second_moment(layer.norm(examples()))
    options = Options(gptq=GptqConfig(act_order=False), search_range=search)
    quantize_(layer, "int4", group_size=32, method="gptq", recorder=recorder, options=options)
    codes_OI, qparams = layer.k_proj.weight.read()  # type: ignore[operator]
    damped_II = h_II + 0.01 * h_II.diagonal().mean() * torch.eye(WIDTH).double().numpy()
    scale_OI, zero_OI = spread(qparams.scale_OG, WIDTH), spread(qparams.zero_OG, WIDTH)
    order_I = torch.arange(WIDTH).numpy()
    naive = naive_gptq(w_OI, damped_II, scale_OI, zero_OI, 4, order_I)
    clear_O = naive.margin_O > 1e-4
    assert clear_O.sum() > 40
    assert (codes_OI.numpy() == naive.codes_OI)[clear_O].all()


def test_gptq_moves_outputs_less_than_rounding(layer: Layer) -> None:
    recorder, rounded = recorded(layer), copy.deepcopy(layer)
    h_II = recorder["q_proj"].moments.mean().double().numpy()  # type: ignore[union-attr]
    dense = layer.q_proj.weight.clone()
    quantize_(layer, "int4", group_size=32, method="gptq", recorder=recorder)
    quantize_(rounded, "int4", group_size=32)
    solved, plain = (
        output_error(dense - m.q_proj.weight.dequantize(), h_II)  # type: ignore[operator]
        for m in (layer, rounded)
    )
    assert solved < 0.8 * plain


def test_smoothquant_folds_into_a_norm_or_stays_on_inputs(layer: Layer) -> None:
    before, recorder = copy.deepcopy(layer), recorded(layer)
    kept, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    quantize_(plain, "int8_dynamic")
    quantize_(kept, "int8_dynamic", method="smoothquant", recorder=recorder)
    quantize_(
        layer, "int8_dynamic", method="smoothquant", recorder=recorder, norms={"norm": "q_proj"}
    )
    assert layer.q_proj.weight.input_factor is None
    assert kept.q_proj.weight.input_factor is not None
    assert torch.equal(kept.norm.weight, before.norm.weight)
    assert not torch.equal(layer.norm.weight, before.norm.weight)
    assert torch.equal(kept.q_proj.weight.input_factor, kept.k_proj.weight.input_factor)  # type: ignore[arg-type]
    for smoothed in (layer, kept):
        assert error(smoothed, before) < 0.8 * error(plain, before)


def test_the_smoothed_norm_and_weights_are_one_function(layer: Layer) -> None:
    """Before any rounding counts: 8-bit weights dequantized, inputs untouched."""
    before = copy.deepcopy(layer)
    options = Options(alphas=(0.5,))
    quantize_(
        layer,
        "int8_dynamic",
        method="smoothquant",
        recorder=recorded(layer),
        options=options,
        norms={"norm": "k_proj"},
    )
    x_TI = examples()
    y_TO = layer.norm(x_TI) @ layer.k_proj.weight.dequantize().t()  # type: ignore[operator]
    wanted = before.norm(x_TI) @ before.k_proj.weight.t()
    assert (y_TO - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "int3"}, "scheme: unknown 'int3': write int4 or"),
        ({"scheme": "int4", "method": "magic"}, "method: unknown 'magic': write rtn or hqq"),
        ({"scheme": "int4", "group_size": 48}, "'q_proj' reads 64 inputs.*write 32 or 64"),
        ({"scheme": "int4", "group_size": "tensor"}, "int4 has no scale per tensor"),
        ({"scheme": "int8_dynamic", "zero_point": "int"}, "int8_dynamic is symmetric"),
        ({"scheme": Scheme(name="int8"), "group_size": 32}, "the Scheme has its own"),
        (
            {"scheme": "int4", "group_size": 32, "method": "gptq"},
            r"write recorder=Recorder\(model\)",
        ),
        ({"scheme": "int8_static"}, "needs ranges"),
        ({"scheme": "int8", "norms": {"norm": "q_proj"}}, "write method='smoothquant'"),
        ({"scheme": "int8", "filter": lambda name, _: name == "norm"}, "is a LayerNorm"),
        ({"scheme": "int8", "filter": lambda *_: False}, "no linear is left"),
        ({"scheme": "int4", "group_size": 32, "layout": "sparse_24"}, "'q_proj': layout"),
        ({"scheme": "int8", "layout": "sparse_24"}, r"'q_proj': .*pruned_24"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(
    options: dict[str, Any], words: str, layer: Layer
) -> None:
    with pytest.raises(QuantizationError, match=words):
        quantize_(layer, **options)
    assert all(type(p) is nn.Parameter for p in layer.parameters())


def test_more_that_is_refused(layer: Layer) -> None:
    recorder = Recorder(layer, ranges=False)
    with recorder:
        layer.k_proj(layer.norm(examples()))
    with pytest.raises(QuantizationError, match=r"write Recorder\(..., ranges=True\)"):
        quantize_(layer, "int8_static", lambda name, _: name == "k_proj", recorder=recorder)
    with pytest.raises(QuantizationError, match="'q_proj' was not called"):
        quantize_(layer, "int4", group_size=32, method="gptq", recorder=recorder)
    only = recorded(layer)
    with pytest.raises(QuantizationError, match="feeds 'k_proj' too"):
        quantize_(
            layer,
            "int8_dynamic",
            lambda name, _: name == "q_proj",
            method="smoothquant",
            recorder=only,
            norms={"norm": "q_proj"},
        )
    quantize_(layer, "int8", lambda name, _: name == "q_proj")
    with pytest.raises(QuantizationError, match="'q_proj' is quantized already"):
        quantize_(layer, "int8", lambda name, _: name == "q_proj")
    layer.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="'k_proj' has weights that are not finite"):
        quantize_(layer, "int8")


def test_a_hessian_that_is_of_no_use_is_an_error(layer: Layer) -> None:
    recorder = Recorder(layer)
    layer.norm.weight.zero_()
    layer.norm.bias.zero_()
    with recorder:
        layer(examples())
    with pytest.raises(QuantizationError, match="'q_proj': the Hessian is not usable"):
        quantize_(layer, "int4", group_size=32, method="gptq", recorder=recorder)


def test_a_pruned_weight_takes_the_sparse_layout(layer: Layer) -> None:
    for module in (layer.q_proj, layer.k_proj, layer.o_proj):
        module.weight.copy_(pruned_24(module.weight))
    before = copy.deepcopy(layer)
    quantize_(layer, "int8_dynamic", layout="sparse_24")
    assert error(layer, before) < 0.02


def test_settings_are_applied_unless_they_are_to_be_left(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(
        "quantcore.quantize.recommended_inductor_settings", lambda: called.append(True)
    )
    quantize_(layer, "int8", lambda name, _: name == "q_proj", inductor_settings=False)
    assert not called
    quantize_(layer, "int8")
    assert called


def test_scales_are_stored_as_the_weights_were(layer: Layer) -> None:
    layer.bfloat16()
    dense = layer.k_proj.weight.clone()
    quantize_(layer, "int4", group_size=32)
    weight = layer.k_proj.weight
    assert isinstance(weight, QuantizedTensor)
    assert (weight.scale.dtype, weight.dtype) == (torch.bfloat16, torch.bfloat16)
    codes_OI, qparams = weight.read()
    again = QuantizedLinear(codes_OI, qparams, weight.scheme)
    assert torch.equal(weight.read_back(), dequantize(codes_OI, again.qparams, weight.scheme))
    step_OI = qparams.scale_OG.repeat_interleave(32, dim=1)
    assert ((weight.read_back() - dense.float()).abs() <= 0.55 * step_OI).all()
