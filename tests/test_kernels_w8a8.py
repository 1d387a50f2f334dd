"""Products of 8-bit inputs: tiles, reference, and the Triton kernel beside it.

On a machine with a GPU the kernel runs on it (`pytest -m gpu`); elsewhere in Triton's interpreter,
which knows no float8 product.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from quantkernels.launches import Codes, Launch
from quantkernels.w8a8 import linear, reference, vendor
from quantkernels.w8a8.tiles import Tiles8, pack_codes, pack_groups, unpack_codes
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
# codes, size of a group, whether inputs have a zero point, whether one scale for all of them
FORMS: list[tuple[Codes, int | None, bool, bool]] = [
    ("int8", None, False, False),
    ("int8", None, False, True),
    ("float8", None, False, False),
    ("float8", None, False, True),
    ("int4", 32, True, False),
    ("int4", 64, True, False),
    ("int4", 128, True, False),
    ("int4", 256, True, False),
    ("int4", None, True, False),
]
LAUNCHES = [
    Launch(rows=64, tokens=16, split=1, turn=128, stages=2, warps=4),
    Launch(rows=128, tokens=32, split=3, turn=128, stages=3, warps=4),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN, or the largest whole number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def values_of(codes: Tensor, kind: Codes) -> np.ndarray:
    whole = codes.cpu().view(torch.int8).numpy()
    if kind != "float8":
        return whole.astype(np.float64)
    values, bits = float8_values()
    table = dict(zip(bits.astype(np.int8).tolist(), values.tolist(), strict=True))
    return np.vectorize(table.__getitem__, otypes=[np.float64])(whole.astype(int))


def codes_of(kind: Codes, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if kind == "int4":
        return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes) if kind == "float8" else codes


def weight_of(
    kind: Codes, size: int | None, zero: bool, *shape: int, tiled: bool = True
) -> tuple[Tiles8, np.ndarray]:
    rows, columns = shape
    codes_OI = codes_of(kind, rows, columns)
    groups = -(-columns // size) if size else 1
    scale_OG = torch.rand(rows, groups, generator=torch.Generator().manual_seed(rows)) / 64
    w_OI = values_of(codes_OI, kind)
    w_OI = w_OI * np.repeat(scale_OG.double().numpy(), -(-columns // groups), axis=1)[:, :columns]
    group = min(size or 0, 128)
    sums_O = torch.zeros(-(-rows // 128) * 128)
    sums_O[:rows] = torch.from_numpy(w_OI.sum(axis=1))
    packed = (pack_codes(codes_OI, kind) if tiled else codes_OI).to(DEVICE)
    made = Tiles8(
        codes=packed.view(torch.float8_e4m3fn) if kind == "float8" else packed,
        scale=pack_groups(scale_OG, columns, group).to(DEVICE),
        sums_O=sums_O.to(DEVICE) if zero else None,
        kind=kind,
        group=group,
        features=(rows, columns),
    )
    return made, w_OI


def inputs_of(
    kind: Codes, zero: bool, one: bool, *shape: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes_TI = codes_of("float8" if kind == "float8" else "int8", *shape).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    scale_T = torch.rand(1 if one else shape[0], generator=generator).to(DEVICE)
    zero_T = None
    if zero:
        zero_T = torch.randint(-128, 128, (shape[0],), generator=generator).float().to(DEVICE)
    return codes_TI.view(torch.float8_e4m3fn) if kind == "float8" else codes_TI, scale_T, zero_T


def wanted(
    kind: Codes, served: tuple[Tensor, Tensor, Tensor | None], w_OI: np.ndarray, bias_O: Tensor
) -> np.ndarray:
    codes_TI, scale_T, zero_T = served
    q_TI = values_of(codes_TI, "float8" if kind == "float8" else "int8")
    if zero_T is not None:
        q_TI = q_TI - zero_T.double().cpu().numpy()[:, None]
    y_TO: np.ndarray = (q_TI * scale_T.double().cpu().numpy()[:, None]) @ w_OI.T
    return y_TO + bias_O.double().cpu().numpy()


def relative(actual: Tensor, right: np.ndarray) -> float:
    difference = actual.double().cpu().numpy() - right
    return float(np.linalg.norm(difference) / max(np.linalg.norm(right), 1e-30))


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (128, 256), (5, 1000)])
def test_codes_come_back_from_tiles(kind: Codes, shape: tuple[int, int]) -> None:
    codes_OI = codes_of(kind, *shape)
    assert torch.equal(unpack_codes(pack_codes(codes_OI, kind), kind, shape), codes_OI)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_is_the_formula(form: tuple[Codes, int | None, bool, bool]) -> None:
    kind, size, zero, one = form
    weight, w_OI = weight_of(kind, size, zero, 130, 512)
    served = inputs_of(kind, zero, one, 7, 512)
    bias_O = torch.randn(130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y_TO = reference.linear(*served, weight, bias_O, torch.float32)
    assert relative(y_TO, wanted(kind, served, w_OI, bias_O)) < 1e-5


@needs_triton
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=range(len(LAUNCHES)))
@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "plain"])
def test_the_kernel_is_the_formula(
    form: tuple[Codes, int | None, bool, bool], launch: Launch, tiled: bool
) -> None:
    from quantkernels.w8a8 import fused

    kind, size, zero, one = form
    if kind == "int4" and not tiled:
        pytest.skip("4-bit codes lie in tiles alone")
    if kind == "float8" and not ON_GPU:
        pytest.skip("Triton's interpreter knows no float8 product")
    for (rows, columns), tokens in itertools.product([(130, 768), (5, 256), (70, 300)], [1, 37]):
        width = columns // (size or 1) * (size or 1) or 256
        weight, w_OI = weight_of(kind, size, zero, rows, width, tiled=tiled)
        served = inputs_of(kind, zero, one, tokens, w_OI.shape[1])
        bias_O = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        y_TO = fused.linear(*served, weight, bias_O, torch.float32, launch)
        most = 1e-3 if kind == "float8" else 2e-6
        assert relative(y_TO, wanted(kind, served, w_OI, bias_O)) < most


@needs_triton
@pytest.mark.parametrize("columns", [96, 300, 576])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("rows", [256, 300])
def test_rows_of_every_block_find_their_groups(rows: int, size: int, columns: int) -> None:
    """Scales are padded to 256 columns and codes to 128: widths of an odd number of tiles."""
    from quantkernels.w8a8 import fused

    columns = max(columns // size, 1) * size
    weight, w_OI = weight_of("int4", size, True, rows, columns)
    served = inputs_of("int4", True, False, 5, columns)
    nothing_O = torch.zeros(rows, device=DEVICE)
    for launch in (*LAUNCHES, replace(LAUNCHES[1], rows=256)):
        y_TO = fused.linear(*served, weight, None, torch.float32, launch)
        assert relative(y_TO, wanted("int4", served, w_OI, nothing_O)) < 2e-6


def test_what_does_not_fit_is_refused_before_memory_is_read_by_it() -> None:
    weight, _ = weight_of("int4", 32, True, 24, 128)
    codes_TI, scale_T, zero_T = inputs_of("int4", True, False, 3, 128)
    for given, words in (
        ((codes_TI[:, 1:], scale_T, zero_T), r"codes_TI is \(3, 127\): write \(T, 128\)"),
        ((codes_TI.float(), scale_T, zero_T), "codes_TI is torch.float32: write torch.int8"),
        ((codes_TI, scale_T[:2], zero_T), "2 scales for 3 tokens: write one of each, or one"),
        ((codes_TI, scale_T, zero_T[:1]), "1 zero points for 3 tokens: write one of each"),
    ):
        with pytest.raises(ValueError, match=words):
            linear(*given, weight)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[4]], ids=str)
def test_the_operator_is_what_torch_asks_of_one(form: tuple[Codes, int | None, bool, bool]) -> None:
    kind, size, zero, one = form
    weight, _ = weight_of(kind, size, zero, 24, 128)
    served = inputs_of(kind, zero, one, 3, 128)
    bias_O = torch.zeros(24, device=DEVICE)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    of_weight = (weight.codes, weight.scale, weight.sums_O, bias_O, kind, weight.group)
    torch.library.opcheck(
        torch.ops.quantkernels.w8a8_linear.default,
        (*served, *of_weight, *weight.features, torch.bfloat16),
        # the schema's check adds inputs up, which no float8 can
        test_utils=checks if kind == "float8" else ["test_schema", *checks],
    )


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[4]], ids=str)
def test_any_number_of_tokens_is_one_program(form: tuple[Codes, int | None, bool, bool]) -> None:
    kind, size, zero, one = form
    weight, _ = weight_of(kind, size, zero, 24, 128)
    tokens = torch.export.Dim("tokens")
    each = None if one else {0: tokens}
    free = {"codes_TI": {0: tokens}, "scale_T": each, "zero_T": {0: tokens} if zero else None}

    class Product(torch.nn.Module):
        def forward(self, codes_TI: Tensor, scale_T: Tensor, zero_T: Tensor | None) -> Tensor:
            return linear(codes_TI, scale_T, zero_T, weight)

    example = inputs_of(kind, zero, one, 3, 128)
    program = torch.export.export(Product(), example, dynamic_shapes=free).module()
    for count in (1, 2, 40):
        served = inputs_of(kind, zero, one, count, 128)
        assert torch.equal(program(*served), linear(*served, weight))


def test_no_tokens_make_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("a dense weight of a head is two gigabytes")

    monkeypatch.setattr("quantkernels.w8a8.FUSED_DEVICES", (DEVICE,))
    monkeypatch.setattr(reference, "values", refused)
    weight, _ = weight_of("int8", None, False, 8, 64)
    y_TO = linear(*inputs_of("int8", False, False, 0, 64), weight, torch.ones(8, device=DEVICE))
    assert y_TO.shape == (0, 8) and y_TO.dtype == torch.bfloat16


def test_torchs_own_products_are_those_of_cuda() -> None:
    weight, _ = weight_of("int8", None, False, 16, 64, tiled=False)
    assert vendor.takes(torch.empty(3, 64, device=DEVICE), weight, torch.bfloat16) == ON_GPU
