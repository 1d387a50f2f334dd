"""Stored tensors, read back by us and by the compressed-tensors library itself."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, dequantize, quantize
from quantcore.formats import FORMATS, QuantizedLinear
from quantcore.schemes import SCHEME_KINDS, FloatGrid, Scheme, every_form

FORMAT = FORMATS["compressed-tensors"]
WIDTH = 96


def carried(name: str) -> list[Scheme]:
    """All forms of a scheme that the format takes, so that a new kind is tested unasked."""
    return [s for s in every_form(name, [32, 48]) if not FORMAT.refusal("Linear", s)]


SCHEMES = [scheme for name in SCHEME_KINDS for scheme in carried(name)]
INT4 = Scheme(name="int4", group_size=32)
INT4_ASYMMETRIC = Scheme(name="int4", group_size=32, zero_point="int")
W8A8 = Scheme(name="int8_dynamic")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

all_schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def linear(scheme: Scheme, rows: int, stored: torch.dtype, width: int = WIDTH) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    # lopsided by another amount in every row: zero points of many values
    w_OI = torch.randn(rows, width, generator=generator) + torch.linspace(-3, 3, rows)[:, None]
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    input_scale = 0.25 if scheme.static else None
    return QuantizedLinear(quantize(w_OI, qparams, scheme), qparams, scheme, input_scale)


def value(quantized: QuantizedLinear) -> Tensor:
    return dequantize(quantized.codes_OI, quantized.qparams, quantized.scheme)


def parsed(config: dict[str, Any]) -> QuantizationConfig:
    """As the library reads it; `dequantize` is for transformers, which takes it out first."""
    known = {key: item for key, item in config.items() if key != "dequantize"}
    return QuantizationConfig.model_validate(known)


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    found: QuantizationScheme = parsed(FORMAT.config({"linear": scheme}, [])).config_groups[
        "group_0"
    ]
    return found


def compressor(scheme: Scheme) -> Any:
    names = {
        "pack-quantized": PackedQuantizationCompressor,
        "int-quantized": IntQuantizationCompressor,
        "float-quantized": FloatQuantizationCompressor,
    }
    return names[FORMAT.config({"linear": scheme}, [])["format"]]


@all_dtypes
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@all_schemes
def test_what_is_stored_reads_back_to_the_bit(
    scheme: Scheme, rows: int, dtype: torch.dtype
) -> None:
    quantized = linear(scheme, rows, dtype)
    tensors = FORMAT.encode(quantized, dtype)
    assert tensors["weight_scale"].dtype == dtype
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back_OI = FORMAT.decode(tensors, scheme, WIDTH)
    assert back_OI.dtype == torch.float32
    assert torch.equal(back_OI, value(quantized))


@pytest.mark.parametrize("width", [1, 31, 50])
@pytest.mark.parametrize("name", SCHEME_KINDS)
def test_rows_that_do_not_fill_whole_words(name: str, width: int) -> None:
    for scheme in (s for s in carried(name) if s.group_size is None):
        quantized = linear(scheme, 5, torch.float32, width)
        back_OI = FORMAT.decode(FORMAT.encode(quantized, torch.float32), scheme, width)
        assert torch.equal(back_OI, value(quantized))


@pytest.mark.parametrize("name", SCHEME_KINDS)
def test_every_code_and_every_zero_point_survives(name: str) -> None:
    grid = SCHEME_KINDS[name].weights
    codes_I = torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).to(torch.int8)
    values_I = codes_I.float()
    if isinstance(grid, FloatGrid):
        values_I = codes_I.view(grid.dtype).float()
        codes_I, values_I = codes_I[values_I.isfinite()], values_I[values_I.isfinite()]
    for scheme in (s for s in carried(name) if s.group_size is None):
        codes_OI, values_OI = codes_I.repeat(len(codes_I), 1), values_I.repeat(len(codes_I), 1)
        scale_OG = torch.full((len(codes_I), 1), 0.5)
        zero_OG = torch.zeros_like(codes_I) if scheme.symmetric else codes_I
        qparams = Qparams(scale_OG, zero_OG[:, None])
        quantized = QuantizedLinear(codes_OI, qparams, scheme)
        back_OI = FORMAT.decode(FORMAT.encode(quantized, torch.float32), scheme, WIDTH)
        assert torch.equal(back_OI, 0.5 * (values_OI - zero_OG[:, None].float()))


def library_unpacks(scheme: Scheme, rows: int) -> bool:
    """compressed-tensors 0.20 raises on grouped 4-bit zero points that fill one row of words."""
    one_word = scheme.bits == 4 and rows <= 8
    return scheme.symmetric or scheme.group_size is None or not one_word


@all_dtypes
@pytest.mark.parametrize(
    ("scheme", "rows"),
    [(s, rows) for s in SCHEMES for rows in (1, 7, 9, 33) if library_unpacks(s, rows)],
    ids=lambda value: value.label() if isinstance(value, Scheme) else str(value),
)
def test_the_library_decompresses_to_the_same_weight(
    scheme: Scheme, rows: int, dtype: torch.dtype
) -> None:
    quantized = linear(scheme, rows, dtype)
    tensors = FORMAT.encode(quantized, dtype)
    theirs_OI = compressor(scheme).decompress(tensors, library_scheme(scheme))["weight"]
    # the library computes in the scale's dtype: our value, rounded to it once
    assert torch.equal(theirs_OI, value(quantized).to(dtype))


@pytest.mark.parametrize("rows", [1, 7, 33])
@all_schemes
def test_the_library_stores_the_same_bytes(scheme: Scheme, rows: int) -> None:
    quantized = linear(scheme, rows, torch.float32)
    state = {
        "weight": value(quantized),
        "weight_scale": quantized.stored_scale(torch.float32),
        "weight_zero_point": quantized.qparams.zero_OG,
    }
    theirs = compressor(scheme).compress(state, library_scheme(scheme))
    ours = FORMAT.encode(quantized, torch.float32)
    if scheme.static:  # no affair of its compressor, which knows weights
        assert ours.pop("input_scale").tolist() == [quantized.input_scale]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@all_schemes
def test_the_names_stored_are_the_librarys(scheme: Scheme) -> None:
    stored = FORMAT.encode(linear(scheme, 4, torch.float32), torch.float32)
    names = compressor(scheme).compression_param_names(library_scheme(scheme))
    assert {*names, *(["input_scale"] if scheme.static else [])} == set(stored)


@all_schemes
def test_one_scheme_targets_every_linear(scheme: Scheme) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": scheme for i in range(3)}
    config = parsed(FORMAT.config(layers, ["lm_head", "a.skipped"]))
    assert config.quant_method == "compressed-tensors"
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    assert config.ignore == ["a.skipped", "lm_head"]
    (group,) = config.config_groups.values()
    assert group.targets == ["Linear"]
    weights = group.weights
    assert (weights.num_bits, weights.type, weights.symmetric) == (
        scheme.bits,
        "float" if isinstance(scheme.grid, FloatGrid) else "int",
        scheme.symmetric,
    )
    assert (weights.strategy, weights.group_size) == (scheme.span, scheme.group_size)
    assert not weights.dynamic
    activations = group.input_activations
    if scheme.activations is None:
        assert activations is None
    else:
        assert activations.num_bits == scheme.activations.grid.bits
        whole = scheme.static or scheme.per_tensor
        expected = ("tensor" if whole else "token", not scheme.static)
        assert (activations.strategy, activations.dynamic) == expected


def test_several_schemes_name_their_linears_one_by_one() -> None:
    other = Scheme(name="int8", group_size=None, zero_point="none")
    layers = {"a.q_proj": INT4, "a.down_proj": W8A8, "b.q_proj": INT4, "b.down_proj": other}
    config = parsed(FORMAT.config(layers, ["lm_head"]))
    assert config.format == "mixed-precision"
    assert config.ignore == ["lm_head"]
    targets = {tuple(group.targets): group for group in config.config_groups.values()}
    assert set(targets) == {("a.q_proj", "b.q_proj"), ("a.down_proj",), ("b.down_proj",)}
    assert targets["a.q_proj", "b.q_proj"].format == "pack-quantized"
    assert targets["a.down_proj",].format == "int-quantized"
    assert targets["a.down_proj",].input_activations.num_bits == 8
    assert targets["b.down_proj",].weights.num_bits == 8


def test_only_zero_points_ask_transformers_to_dequantize() -> None:
    assert FORMAT.config({"a": INT4_ASYMMETRIC}, [])["dequantize"] is True
    assert "dequantize" not in FORMAT.config({"a": INT4, "b": W8A8}, [])


@pytest.mark.parametrize("scheme", [INT4, INT4_ASYMMETRIC, W8A8], ids=Scheme.label)
def test_transformers_takes_the_config(scheme: Scheme) -> None:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = FORMAT.config({"a": scheme}, ["lm_head"])
    read = CompressedTensorsConfig.from_dict(dict(config))
    assert read.quantization_config.config_groups["group_0"].weights.num_bits == scheme.bits
    assert read.quantization_config.ignore == ["lm_head"]


def test_what_the_format_cannot_carry_is_refused() -> None:
    assert FORMAT.refusal("Linear", INT4_ASYMMETRIC) is None
    assert "no Conv1D layers" in (FORMAT.refusal("Conv1D", INT4) or "")
    offset = Scheme(name="int4", group_size=32, zero_point="float")
    assert "zero_point: int" in (FORMAT.refusal("Linear", offset) or "")


def test_schemes_that_cannot_stand_together_are_refused() -> None:
    assert FORMAT.refusal_together(frozenset({INT4_ASYMMETRIC})) is None
    assert FORMAT.refusal_together(frozenset({INT4, W8A8})) is None
    assert "symmetric: true" in (FORMAT.refusal_together(frozenset({INT4_ASYMMETRIC, INT4})) or "")
