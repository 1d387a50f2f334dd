"""The gptq format, read back by a reader of the test's own, written from its description."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.fetch import fetch
from quantcore.affine import Qparams, choose_qparams, dequantize, quantize
from quantcore.errors import SourceError
from quantcore.formats import FORMATS, QuantizedLinear
from quantcore.formats.gptq import scheme_of
from quantcore.schemes import SCHEME_KINDS, Scheme, every_form
from tests.test_orchestrator_job import run_here
from tests.test_scheme_jobs import most, section
from workers.loading import load
from workers.store import open_store

WIDTH = 96
VERSIONS = {"gptq": 1, "gptq_v2": 2}

ROWS = [
    (form, scheme)
    for form in VERSIONS
    for name in SCHEME_KINDS
    for scheme in every_form(name, [16, 32])
    if not FORMATS[form].refusal("Linear", scheme)
]
all_rows = pytest.mark.parametrize(
    ("form", "scheme"), ROWS, ids=lambda v: v.label() if isinstance(v, Scheme) else v
)
INT4 = Scheme(name="int4", group_size=32)
INT8 = Scheme(name="int8")


def linear(form: str, scheme: Scheme, stored: torch.dtype, rows: int = 24) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    # lopsided by another amount in every row: zero points of many values, 0 and the largest too
    w_OI = torch.randn(rows, WIDTH, generator=generator) + torch.linspace(-9, 9, rows)[:, None]
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    qparams = FORMATS[form].storable(qparams, scheme, stored)
    return QuantizedLinear(quantize(w_OI, qparams, scheme), qparams, scheme)


def value(quantized: QuantizedLinear) -> Tensor:
    return dequantize(quantized.codes_OI, quantized.qparams, quantized.scheme)


def described(tensors: dict[str, Tensor], bits: int, version: int) -> npt.NDArray[np.float64]:
    """scale * (code - zero) in float64, field by field."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].numpy().astype(np.float64), tensors["g_idx"].numpy()
    per_word, mask = 32 // bits, 2**bits - 1
    w_OI = np.empty((scales.shape[1], len(g_idx)))
    for output, place in np.ndindex(*w_OI.shape):
        word = int(qweight[place // per_word, output])
        code = word >> bits * (place % per_word) & mask
        group = g_idx[place]
        zero = int(qzeros[group, output // per_word]) >> bits * (output % per_word) & mask
        zero += version == 1
        w_OI[output, place] = scales[group, output] * (code - zero)
    return w_OI


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@all_rows
def test_what_is_stored_is_what_the_format_says(
    form: str, scheme: Scheme, stored: torch.dtype
) -> None:
    quantized = linear(form, scheme, stored)
    tensors = FORMATS[form].encode(quantized, stored)
    groups, words = scheme.groups_of(WIDTH), 32 // scheme.bits
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (WIDTH // words, 24)),
        "qzeros": (torch.int32, (groups, 24 // words)),
        "scales": (torch.float16, (groups, 24)),
        "g_idx": (torch.int32, (WIDTH,)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    # a product of a scale's 11 bits and a code's 9 is exact in float32
    theirs_OI = described(tensors, scheme.bits, VERSIONS[form])
    assert np.array_equal(theirs_OI, value(quantized).double().numpy())
    assert torch.equal(FORMATS[form].decode(tensors, scheme, WIDTH), value(quantized))


@pytest.mark.parametrize(("scheme", "field"), [(INT4, "7"), (INT8, "7f")])
def test_a_symmetric_grid_has_the_middle_code_for_zero(scheme: Scheme, field: str) -> None:
    v1, v2 = (
        FORMATS[form].encode(linear(form, scheme, torch.float16), torch.float16)["qzeros"]
        for form in VERSIONS
    )
    less_one = int(field * (8 // len(field)), 16)
    assert (v1 == less_one).all()
    assert (v2.long() % 2**32 == int(f"{int(field, 16) + 1:x}" * (8 // len(field)), 16)).all()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_every_code_and_every_zero_point_survives(name: str) -> None:
    grid = SCHEME_KINDS[name].weights
    scheme = Scheme(name=name, zero_point="int")
    codes_I = torch.arange(grid.lowest, grid.highest + 1).to(torch.int8)
    codes_OI = codes_I.repeat(len(codes_I), 1)
    qparams = Qparams(torch.full((len(codes_I), 1), 0.5), codes_I[:, None])
    tensors = FORMATS["gptq_v2"].encode(QuantizedLinear(codes_OI, qparams, scheme), torch.float16)
    expected_OI = 0.5 * (codes_OI.float() - codes_I[:, None].float())
    assert torch.equal(FORMATS["gptq_v2"].decode(tensors, scheme, len(codes_I)), expected_OI)
    theirs_OI = described(tensors, scheme.bits, 2)
    assert np.array_equal(theirs_OI, expected_OI.double().numpy())


def test_scales_of_a_bfloat16_model_are_exact_in_both_types() -> None:
    scale_OG = torch.logspace(-5, 2, 500)[:, None]
    qparams = Qparams(scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8))
    kept_OG = FORMATS["gptq"].storable(qparams, INT8, torch.bfloat16).scale_OG
    assert torch.equal(kept_OG, scale_OG.bfloat16().float())
    assert torch.equal(kept_OG.half().float(), kept_OG)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_scales_out_of_float16s_range_become_its_ends(stored: torch.dtype) -> None:
    scale_OG = torch.tensor([[1e-30], [3e-8], [1e30]])
    qparams = Qparams(scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8))
    kept_OG = FORMATS["gptq"].storable(qparams, INT8, stored).scale_OG
    assert kept_OG.flatten().tolist() == [2.0**-24, 2.0**-24, 65504.0]


@pytest.mark.parametrize(
    ("form", "kind", "scheme", "message"),
    [
        ("gptq", "Conv1D", INT4, "skip: true"),
        ("gptq", "Linear", Scheme(name="int8_dynamic"), "scheme: int4 or int8, or .*compressed"),
        ("gptq_v2", "Linear", Scheme(name="float8"), "scheme: int4 or int8, or .*compressed"),
        ("gptq_v2", "Linear", Scheme(name="int4", zero_point="float"), "output.format: native"),
        ("gptq", "Linear", Scheme(name="int4", zero_point="int"), "output.format: gptq_v2"),
        ("gptq", "Linear", Scheme(name="int4", group_size=48), "one of 16, 32, 64, 128"),
    ],
)
def test_what_the_format_cannot_carry_is_refused(
    form: str, kind: str, scheme: Scheme, message: str
) -> None:
    assert re.search(message, FORMATS[form].refusal(kind, scheme) or "")


@pytest.mark.parametrize(("rows", "width", "bits"), [(12, 64, 4), (64, 36, 4), (62, 64, 8)])
def test_what_fills_no_whole_words_is_refused(rows: int, width: int, bits: int) -> None:
    scheme = Scheme(name=f"int{bits}")
    refusal = FORMATS["gptq"].shape_refusal
    assert "skip: true" in (refusal(scheme, rows, width) or "")
    assert refusal(scheme, 8, 64) is None


def matched(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """As GPTQModel and vLLM look a module up: by the first rule that it begins with."""
    words = {key: config[key] for key in ("bits", "group_size", "sym")}
    for pattern, rule in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else words | rule
    return words


def test_one_scheme_needs_no_rules() -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": INT4 for i in range(3)}
    assert FORMATS["gptq"].config(layers, ["lm_head"]) == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def test_rules_name_what_differs_and_what_is_skipped() -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{part}" for block in (1, 11, 2) for part in parts]
    layers = {
        name: INT8 if "layers.11.self" in name else INT4
        for name in names
        if "layers.1.self" not in name and "layers.2.mlp" not in name
    }
    skipped = [name for name in names if name not in layers]
    config = FORMATS["gptq"].config(layers, [*skipped, "lm_head"])
    eight = {"bits": 8, "group_size": -1, "sym": True}
    four = {"bits": 4, "group_size": 32, "sym": True}
    for name in names:
        expected = None if name in skipped else eight if layers[name] == INT8 else four
        assert matched(config, name) == expected, name
        assert name in skipped or scheme_of(name, config) == layers[name]
    # engines ask for the matrix that they load q, k and v as
    assert matched(config, "model.layers.11.self_attn.qkv_proj") == eight
    assert matched(config, "model.layers.1.self_attn.qkv_proj") is None
    assert matched(config, "model.layers.2.self_attn.qkv_proj") == four
    assert config["modules_in_block_to_quantize"] == [sorted(layers)]


def test_a_head_that_is_left_alone_is_no_skipped_module() -> None:
    config = FORMATS["gptq"].config({"model.layers.0.mlp.up_proj": INT4}, ["lm_head"])
    assert "dynamic" not in config
    assert "modules_in_block_to_quantize" not in config


Job = Callable[..., Path]


@pytest.mark.parametrize(
    ("form", "scheme", "method"),
    [
        *((form, scheme, "rtn") for form, scheme in ROWS if scheme.group_size != 16),
        ("gptq", INT4, "gptq"),
        ("gptq_v2", Scheme(name="int4", group_size=32, zero_point="int"), "gptq"),
    ],
    ids=lambda v: v.label() if isinstance(v, Scheme) else v,
)
def test_a_job_ends_in_a_model_that_computes(
    form: str,
    scheme: Scheme,
    method: str,
    job_file: Job,
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = finished(job_file, tmp_path, form, section(scheme, method))
    prompt = torch.arange(2, 30)[None]
    original = load(model_folder("llama"), torch.float32)
    loaded = load(out, torch.float32)
    logits = loaded(prompt).logits
    # the weights themselves, by the test's reader, in the original model
    files = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    for name, module in original.named_modules():
        if f"{name}.qweight" in stored:
            parts = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales")}
            parts["g_idx"] = stored[f"{name}.g_idx"]
            w_OI = torch.tensor(described(parts, scheme.bits, VERSIONS[form])).float()
            module.weight.data = w_OI
    torch.testing.assert_close(original(prompt).logits, logits)
    plain = load(model_folder("llama"), torch.float32)(prompt).logits
    assert 0 < (logits - plain).norm() / plain.norm() < 4 * most(scheme)


def finished(job_file: Job, tmp_path: Path, form: str, quantization: dict[str, Any]) -> Path:
    output = {"store": str(tmp_path / "store"), "format": form}
    calibrated = {} if quantization["method"] == "gptq" else {"calibration": None}
    result = run_here(job_file(quantization=quantization, output=output, **calibrated))
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    return out


def test_several_schemes_and_skipped_linears_load(
    job_file: Job, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.mlp.*", "scheme": "int8"},
        {"match": "*.layers.2.self_attn.o_proj", "group_size": 16},
    ]
    quantization = {**section(INT4, "gptq"), "overrides": overrides}
    loaded = load(finished(job_file, tmp_path, "gptq", quantization), torch.float32)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter
    for name, shape in (("1.mlp.up_proj", (128, 1)), ("2.self_attn.o_proj", (64, 4))):
        _, qparams = loaded.model.layers.get_submodule(name).weight.read()
        assert qparams.scale_OG.shape == shape
    prompt = torch.arange(2, 30)[None]
    plain = load(model_folder("llama"), torch.float32)(prompt).logits
    assert (loaded(prompt).logits - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("damage", ["desc_act", "marlin", "bits", "lost"])
def test_an_artifact_that_is_none_of_ours_is_refused(
    damage: str, job_file: Job, tmp_path: Path
) -> None:
    out = finished(job_file, tmp_path, "gptq", section(INT4, "rtn"))
    file = sorted(out.glob("block-00001*.safetensors"))[0]
    tensors, config = load_file(file), out / "config.json"
    if damage == "desc_act":
        tensors["model.layers.1.mlp.up_proj.g_idx"] = torch.arange(64).flip(0).int() // 32
    elif damage == "lost":
        del tensors["model.layers.1.mlp.up_proj.scales"]
    elif damage == "bits":
        config.write_text(config.read_text().replace('"bits": 4', '"bits": 3'))
    else:
        written = '"checkpoint_format": "gptq"'
        config.write_text(config.read_text().replace(written, '"checkpoint_format": "marlin"'))
    save_file(tensors, file)
    with pytest.raises(SourceError, match="no gptq artifact that is whole"):
        load(out, torch.float32)
