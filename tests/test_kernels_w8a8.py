"""Products of 8-bit inputs: the reference, and the Triton kernel beside it.

On a machine with a GPU the kernel runs on it (`pytest -m gpu`); elsewhere in Triton's interpreter,
which knows no float8 product.
"""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from quantkernels.launches import Codes, Launch
from quantkernels.w8a8 import Weight8, linear, reference, vendor
from torch import Tensor

from tests.references import float8_values

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
# codes, whether one scale for all inputs
FORMS: list[tuple[Codes, bool]] = [
    ("int8", False),
    ("int8", True),
    ("float8", False),
    ("float8", True),
]
LAUNCHES = [
    Launch(rows=64, tokens=16, split=1, turn=128, stages=2, warps=4),
    Launch(rows=128, tokens=32, split=3, turn=128, stages=3, warps=4),
]

if ON_GPU:  # which the interpreter cannot be
    many = {"turn": 128, "early": True, "overlapped": True}
    LAUNCHES += [
        Launch(rows=128, tokens=64, split=1, stages=4, warps=4, **many),
        Launch(rows=128, tokens=128, split=2, stages=3, warps=8, **many),
        Launch(rows=256, tokens=32, split=3, stages=4, warps=8, **many),
    ]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def values_of(codes: Tensor, kind: Codes) -> np.ndarray:
    whole = codes.cpu().view(torch.int8).numpy()
    if kind != "float8":
        return whole.astype(np.float64)
    values, bits = float8_values()
    table = dict(zip(bits.astype(np.int8).tolist(), values.tolist(), strict=True))
    return np.vectorize(table.__getitem__, otypes=[np.float64])(whole.astype(int))


def codes_of(kind: Codes, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes) if kind == "float8" else codes


def weight_of(kind: Codes, rows: int, columns: int) -> tuple[Weight8, np.ndarray]:
    codes_OI = codes_of(kind, rows, columns)
    scale_O = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) / 64
    w_OI = values_of(codes_OI, kind) * scale_O.double().numpy()[:, None]
    codes_OI = codes_OI.to(DEVICE)
    made = Weight8(
        codes_OI=codes_OI.view(torch.float8_e4m3fn) if kind == "float8" else codes_OI,
        scale_O=scale_O.to(DEVICE),
        kind=kind,
        features=(rows, columns),
    )
    return made, w_OI


def inputs_of(kind: Codes, one: bool, *shape: int) -> tuple[Tensor, Tensor]:
    codes_TI = codes_of(kind, *shape).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    scale_T = torch.rand(1 if one else shape[0], generator=generator).to(DEVICE)
    return codes_TI.view(torch.float8_e4m3fn) if kind == "float8" else codes_TI, scale_T


def wanted(
    kind: Codes, served: tuple[Tensor, Tensor], w_OI: np.ndarray, bias_O: Tensor
) -> np.ndarray:
    codes_TI, scale_T = served
    x_TI = values_of(codes_TI, kind) * scale_T.double().cpu().numpy()[:, None]
    y_TO: np.ndarray = x_TI @ w_OI.T
    return y_TO + bias_O.double().cpu().numpy()


def relative(actual: Tensor, right: np.ndarray) -> float:
    difference = actual.double().cpu().numpy() - right
    return float(np.linalg.norm(difference) / max(np.linalg.norm(right), 1e-30))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_is_the_formula(form: tuple[Codes, bool]) -> None:
    kind, one = form
    weight, w_OI = weight_of(kind, 130, 512)
    served = inputs_of(kind, one, 7, 512)
    bias_O = torch.randn(130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y_TO = reference.linear(*served, weight, bias_O, torch.float32)
    assert relative(y_TO, wanted(kind, served, w_OI, bias_O)) < 1e-5


@needs_triton
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=range(len(LAUNCHES)))
def test_the_kernel_is_the_formula(form: tuple[Codes, bool], launch: Launch) -> None:
    from quantkernels.w8a8 import fused

    kind, one = form
    if kind == "float8" and not ON_GPU:
        pytest.skip("Triton's interpreter knows no float8 product")
    for (rows, columns), tokens in itertools.product([(130, 768), (5, 256), (70, 300)], [1, 37]):
        weight, w_OI = weight_of(kind, rows, columns)
        served = inputs_of(kind, one, tokens, columns)
        bias_O = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        y_TO = fused.linear(*served, weight, bias_O, torch.float32, launch)
        most = 1e-3 if kind == "float8" else 2e-6
        assert relative(y_TO, wanted(kind, served, w_OI, bias_O)) < most


@needs_triton
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES[2:], ids=str)
def test_whole_codes_give_the_same_bits_however_they_are_added_up(
    launch: Launch, one: bool
) -> None:
    """Sums are exact, so no launch differs; counters are back at 0 for the next one."""
    from quantkernels.w8a8 import fused

    weight, _ = weight_of("int8", 1500, 4224)
    served = inputs_of("int8", one, 300, 4224)
    bias_O = torch.randn(1500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wanted_TO = fused.linear(*served, weight, bias_O, torch.float32, LAUNCHES[0])
    for _ in range(20):
        assert torch.equal(fused.linear(*served, weight, bias_O, torch.float32, launch), wanted_TO)


def test_what_does_not_fit_is_refused_before_memory_is_read_by_it() -> None:
    weight, _ = weight_of("int8", 24, 128)
    codes_TI, scale_T = inputs_of("int8", False, 3, 128)
    for given, words in (
        ((codes_TI[:, 1:], scale_T), r"codes_TI is \(3, 127\): write \(T, 128\)"),
        ((codes_TI.float(), scale_T), "codes_TI is torch.float32: write torch.int8"),
        ((codes_TI, scale_T[:2]), "2 scales for 3 tokens: write one of each, or one"),
    ):
        with pytest.raises(ValueError, match=words):
            linear(*given, weight)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
def test_the_operator_is_what_torch_asks_of_one(form: tuple[Codes, bool]) -> None:
    kind, one = form
    weight, _ = weight_of(kind, 24, 128)
    served = inputs_of(kind, one, 3, 128)
    bias_O = torch.zeros(24, device=DEVICE)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(
        torch.ops.quantkernels.w8a8_linear.default,
        (*served, weight.codes_OI, weight.scale_O, bias_O, kind, *weight.features, torch.bfloat16),
        # the schema's check adds inputs up, which no float8 can
        test_utils=checks if kind == "float8" else ["test_schema", *checks],
    )


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
def test_any_number_of_tokens_is_one_program(form: tuple[Codes, bool]) -> None:
    kind, one = form
    weight, _ = weight_of(kind, 24, 128)
    tokens = torch.export.Dim("tokens")
    free = {"codes_TI": {0: tokens}, "scale_T": None if one else {0: tokens}}

    class Product(torch.nn.Module):
        def forward(self, codes_TI: Tensor, scale_T: Tensor) -> Tensor:
            return linear(codes_TI, scale_T, weight)

    example = inputs_of(kind, one, 3, 128)
    program = torch.export.export(Product(), example, dynamic_shapes=free).module()
    for count in (1, 2, 40):
        served = inputs_of(kind, one, count, 128)
        assert torch.equal(program(*served), linear(*served, weight))


def test_no_tokens_make_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("a dense weight of a head is two gigabytes")

    monkeypatch.setattr("quantkernels.w8a8.FUSED_DEVICES", (DEVICE,))
    monkeypatch.setattr(reference, "values", refused)
    weight, _ = weight_of("int8", 8, 64)
    y_TO = linear(*inputs_of("int8", False, 0, 64), weight, torch.ones(8, device=DEVICE))
    assert y_TO.shape == (0, 8) and y_TO.dtype == torch.bfloat16


def test_torchs_own_products_are_those_of_cuda() -> None:
    weight, _ = weight_of("int8", 16, 64)
    assert vendor.takes(torch.empty(3, 64, device=DEVICE), weight, torch.bfloat16) == ON_GPU
