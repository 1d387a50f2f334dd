"""HQQ jobs from a job file: alone and beside other methods, with texts and without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.fetch import fetch
from quantcore.affine import choose_qparams, dequantize, quantize
from quantcore.errors import SpecError
from quantcore.hqq import HqqConfig, hqq_qparams
from quantcore.schemes import SCHEME_KINDS, IntegerGrid, Scheme, every_form
from tests.command import Outcome, quantfleet
from tests.test_orchestrator_job import JobFile, model_bytes, run_here
from tests.test_scheme_jobs import section
from workers.loading import load
from workers.store import open_store

FORMS = [
    scheme
    for name, kind in SCHEME_KINDS.items()
    if isinstance(kind.weights, IntegerGrid)
    for scheme in every_form(name, [32])
]
ALONE = [scheme for scheme in FORMS if not scheme.static]  # that need no texts
INT4 = {"scheme": "int4", "group_size": 32, "method": "hqq"}
FLOAT_ZERO = {**INT4, "symmetric": False, "zero_point": "float"}
NATIVE = {"format": "native"}


def job_of(job_file: JobFile, tmp_path: Path, name: str, words: Any, **sections: Any) -> Path:
    output = {"store": str(tmp_path / "store"), **NATIVE}
    return job_file(name, quantization=words, **{"calibration": None, "output": output, **sections})


def tensors_of(store: str) -> dict[str, torch.Tensor]:
    files = sorted((Path(store) / "model").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scheme", ALONE, ids=Scheme.label)
def test_without_texts_a_job_publishes_what_hqq_solves(
    scheme: Scheme, job_file: JobFile, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    job = job_of(job_file, tmp_path, "job", section(scheme, "hqq"))
    result = run_here(job, workers=2)
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    served = load(out, torch.float32)
    source = load(model_folder("llama"), torch.float32)
    lines = {line["layer"]: line for line in result.report["layers"]}
    assert len(lines) == 21
    for name, line in lines.items():
        w_OI = source.get_submodule(name).weight.data
        qparams = hqq_qparams(w_OI, scheme, HqqConfig(), stored=w_OI.dtype)
        plain = choose_qparams(w_OI, scheme, stored=w_OI.dtype)
        codes_OI, kept = served.get_submodule(name).weight.read()
        assert torch.equal(codes_OI, quantize(w_OI, qparams, scheme))
        assert torch.equal(kept.scale_OG, qparams.scale_OG)
        assert torch.equal(kept.zero_OG.float(), qparams.zero_OG.float())
        assert (line["scheme"], line["method"]) == (scheme.label(), "hqq")
        errors = [
            ((w_OI - dequantize(quantize(w_OI, q, scheme), q, scheme)).norm() / w_OI.norm()).item()
            for q in (qparams, plain)
        ]
        assert line["relative_weight_error"] == pytest.approx(errors[0], rel=1e-5)
        assert errors[0] < 1.001 * errors[1]


@pytest.mark.parametrize("words", [INT4, FLOAT_ZERO, {"scheme": "int8", "method": "hqq"}], ids=str)
def test_texts_and_workers_change_no_byte(
    words: dict[str, Any], job_file: JobFile, text_file: Path, tmp_path: Path
) -> None:
    """Rows are solved in tiles where there are texts, and linear by linear where there are not."""
    alone = run_here(job_of(job_file, tmp_path, "alone", words))
    texts = {"calibration": {"text": str(text_file), "sequences": 8, "length": 32}}
    calibrated = [
        run_here(job_of(job_file, tmp_path, f"texts{count}", words, **texts), workers=count)
        for count in (1, 2)
    ]
    for other in calibrated:
        assert model_bytes(other.store) == model_bytes(alone.store)
        assert all(line["relative_output_error"] > 0 for line in other.report["layers"])


def test_a_job_that_died_goes_on_to_the_same_bytes(job_file: JobFile, tmp_path: Path) -> None:
    from tests.test_orchestrator_job import _Dies

    whole = run_here(job_of(job_file, tmp_path, "whole", INT4)).store
    job = job_of(job_file, tmp_path, "broken", INT4)
    with pytest.raises(KeyboardInterrupt):
        run_here(job, observer=_Dies("round/1"))
    assert not (Path(whole).parent / "broken" / "manifest.json").exists()
    assert model_bytes(run_here(job, workers=2).store) == model_bytes(whole)


def test_what_the_solver_is_told_is_part_of_the_job(job_file: JobFile, tmp_path: Path) -> None:
    run_here(job_of(job_file, tmp_path, "job", INT4))
    for key, value in {"norm": 0.9, "beta": 2.0, "growth": 1.1, "iterations": 3}.items():
        other = job_of(job_file, tmp_path, "job", {**INT4, "hqq": {key: value}})
        with pytest.raises(SpecError, match=rf"quantization\.hqq\.{key}: this job was begun"):
            run_here(other)


def test_what_the_solver_is_told_reaches_it(job_file: JobFile, tmp_path: Path) -> None:
    plain = tensors_of(run_here(job_of(job_file, tmp_path, "plain", FLOAT_ZERO)).store)
    told = {**FLOAT_ZERO, "hqq": {"iterations": 1}}
    hurried = tensors_of(run_here(job_of(job_file, tmp_path, "hurried", told)).store)
    name = "model.layers.0.self_attn.q_proj.weight_zero"
    assert not torch.equal(plain[name], hurried[name])


def test_linears_may_be_hqqs_beside_others_gptqs_and_rounded_ones(
    job_file: JobFile, text_file: Path, tmp_path: Path
) -> None:
    words = {
        **INT4,
        "overrides": [
            {"match": "*.self_attn.*", "method": "gptq"},
            {"match": "*.down_proj", "method": "rtn"},
            {"match": "lm_head", "method": "hqq", "scheme": "int8"},
        ],
    }
    texts = {"calibration": {"text": str(text_file), "sequences": 8, "length": 32}}
    mixed = [
        run_here(job_of(job_file, tmp_path, f"mixed{count}", words, **texts), workers=count)
        for count in (1, 2)
    ]
    assert model_bytes(mixed[0].store) == model_bytes(mixed[1].store)
    methods = {line["layer"]: line["method"] for line in mixed[0].report["layers"]}
    assert len(methods) == 22 and methods["lm_head"] == "hqq"
    for name, method in methods.items():
        if name != "lm_head":
            expected = "gptq" if "self_attn" in name else "rtn" if "down" in name else "hqq"
            assert method == expected
    damped = {line["method"] for line in mixed[0].report["layers"] if line["damping"]}
    assert damped == {"gptq"}
    alone = tensors_of(run_here(job_of(job_file, tmp_path, "alone", INT4)).store)
    for name, tensor in tensors_of(mixed[0].store).items():
        if "gate_proj" in name or "up_proj" in name:
            assert torch.equal(tensor, alone[name])


def test_a_head_beside_blocks_without_texts(job_file: JobFile, tmp_path: Path) -> None:
    words = {**INT4, "overrides": [{"match": "lm_head", "group_size": 64}]}
    result = run_here(job_of(job_file, tmp_path, "job", words))
    (line,) = [line for line in result.report["layers"] if line["layer"] == "lm_head"]
    assert (line["method"], line["scheme"]) == ("hqq", "int4 sym g64")
    assert 0 < line["relative_weight_error"] < 0.2


def test_statistics_serve_a_static_scheme(
    job_file: JobFile, text_file: Path, tmp_path: Path
) -> None:
    texts = {"text": str(text_file), "sequences": 8, "length": 32, "keep_statistics": True}
    kept = run_here(job_of(job_file, tmp_path, "kept", INT4, calibration=texts))
    words = {"scheme": "int8_static", "method": "hqq"}
    again = run_here(
        job_of(job_file, tmp_path, "again", words, calibration={"statistics": kept.store})
    )
    assert {line["method"] for line in again.report["layers"]} == {"hqq"}
    assert all(0 < line["relative_output_error"] < 0.05 for line in again.report["layers"])


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int8_dynamic_int4"])
def test_smoothed_weights_may_be_hqqs(
    scheme: str, job_file: JobFile, text_file: Path, tmp_path: Path
) -> None:
    words = {"scheme": scheme, "method": "smoothquant"}
    texts = {"calibration": {"text": str(text_file), "sequences": 8, "length": 32}}
    stores = {}
    for rounding in ("rtn", "hqq"):
        told = {**words, "smoothquant": {"alpha": 0.5, "rounding": rounding}}
        result = run_here(job_of(job_file, tmp_path, rounding, told, **texts))
        assert {line["method"] for line in result.report["layers"]} == {"smoothquant"}
        stores[rounding] = tensors_of(result.store)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    assert not torch.equal(stores["rtn"][name], stores["hqq"][name])
    norm = "model.layers.0.input_layernorm.weight"  # chosen before any weight is rounded
    assert torch.equal(stores["rtn"][norm], stores["hqq"][norm])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"scheme": "float8", "method": "hqq"},
            "hqq fits grids of whole codes, and float8 has none: write scheme: int4 or int8 or "
            "int8_dynamic or int8_static or int8_dynamic_int4, or another method",
        ),
        (
            {**INT4, "overrides": [{"match": "*.mlp.*", "scheme": "float8_dynamic"}]},
            "hqq fits grids of whole codes, and float8_dynamic has none",
        ),
        (
            {
                "scheme": "float8_dynamic",
                "method": "smoothquant",
                "smoothquant": {"rounding": "hqq"},
            },
            "hqq fits grids of whole codes, and float8_dynamic has none",
        ),
        ({"scheme": "int8_static", "method": "hqq"}, "int8_static finds its activation scales in"),
        ({**INT4, "hqq": {"norm": 2}}, "quantization.hqq.norm: Input should be less than or equal"),
        ({**INT4, "hqq": {"beta": 0}}, "quantization.hqq.beta: Input should be greater than 0"),
        ({**INT4, "hqq": {"growth": 0.5}}, "quantization.hqq.growth: Input should be greater than"),
        ({**INT4, "hqq": {"iterations": 0}}, "quantization.hqq.iterations: Input should be gre"),
        (
            {**INT4, "hqq": {"kappa": 1.01}},
            "quantization.hqq.kappa: unknown key: write one of norm",
        ),
        ({**INT4, "method": "hq"}, "quantization.method: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_in_one_line(
    words: dict[str, Any], message: str, job_file: JobFile, refused: Callable[..., str]
) -> None:
    assert message in refused(2, "check", job_file(quantization=words, calibration=None))


def test_check_tells_of_hqq_and_its_time(job_file: JobFile) -> None:
    def predicted(iterations: int) -> Any:
        words = {**INT4, "hqq": {"iterations": iterations}}
        outcome: Outcome = quantfleet(
            "check", "--json", job_file(quantization=words, calibration=None)
        )
        return json.loads(outcome.out)

    plan = predicted(20)
    assert plan["layers"] == {"int4 sym g32 hqq": 21}
    seconds = [predicted(n)["predicted"]["job"]["seconds"]["quantize"] for n in (1, 1000)]
    assert seconds[0] < seconds[1]
