"""Whole W8A8 jobs: smoothed or not, activations by token or by one calibrated scale."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from quantcore.activations import fake_quantize
from quantcore.errors import SourceError
from quantcore.schemes import Scheme
from tests.conftest import save_model
from tests.faults import KillingExecutor, schedule
from tests.test_orchestrator_job import model_bytes, run_here
from workers.loading import load
from workers.store import open_store

JobFile = Callable[..., Path]

SMOOTH = {"scheme": "int8_dynamic", "method": "smoothquant"}
STATIC = {"scheme": "int8_static", "method": "smoothquant"}
HALF = {"alpha": 0.5}
_LOUD = (5, 40)  # channels of the residual stream, as every large model has some


@pytest.fixture(scope="module")
def loud_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama in bfloat16 with a few channels far above the others."""
    folder = save_model("llama", tmp_path_factory.mktemp("loud"), torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[list(_LOUD)] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def loud_job(job_file: JobFile, loud_model: Path) -> JobFile:
    def write(name: str, quantization: dict[str, Any], **sections: Any) -> Path:
        model = {"path": str(loud_model)}
        return job_file(name, quantization=quantization, model=model, **sections)

    return write


def lines_of(job: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = run_here(job).report["layers"]
    return lines


def served(folder: Path, ids_BL: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids_BL).logits
    return logits


def simulated(folder: Path, ids_BL: Tensor) -> Tensor:
    """The artifact's stored numbers, put together by hand, activations rounded by our own code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scales = {k.removesuffix(".input_scale"): v for k, v in tensors.items() if "input_scale" in k}
    state = {k: v for k, v in tensors.items() if "_scale" not in k}
    for name in [k.removesuffix("_scale") for k in tensors if k.endswith("weight_scale")]:
        state[name] = state[name].float() * tensors[f"{name}_scale"].float()
        layer = name.removesuffix(".weight")
        kind = "int8_static" if layer in scales else "int8_dynamic"
        scheme = Scheme(name=kind, group_size=None, zero_point="none")
        scale = scales[layer].item() if layer in scales else None

        def hook(_module: Any, args: Any, scheme: Scheme = scheme, scale: Any = scale) -> Any:
            return (fake_quantize(args[0], scheme, scale),)

        model.get_submodule(layer).register_forward_pre_hook(hook)
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    with torch.no_grad():
        logits: Tensor = model(ids_BL).logits
    return logits


@pytest.mark.parametrize(
    "quantization",
    [
        SMOOTH,
        {**SMOOTH, "smoothquant": HALF},
        {**SMOOTH, "smoothquant": {"rounding": "gptq"}},
        STATIC,
        {"scheme": "int8_static", "method": "rtn"},
        {"scheme": "int8_static", "method": "gptq"},
        {**SMOOTH, "overrides": [{"match": "*.mlp.*", "scheme": "int8_static"}]},
    ],
    ids=str,
)
def test_transformers_serves_what_was_measured(
    loud_job: JobFile, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    result = run_here(loud_job("job", quantization))
    fetch(open_store(result.store), tmp_path / "out")
    ids_BL = torch.arange(2, 34)[None]
    theirs, ours = served(tmp_path / "out", ids_BL), simulated(tmp_path / "out", ids_BL)
    # a last bit that falls the other way moves an activation by a whole step
    assert (theirs - ours).abs().median() < 0.02 * ours.std()
    assert theirs.std() > 0.1
    for line in result.report["layers"]:
        assert 0 < line["relative_output_error"] < 0.2, line


@pytest.mark.parametrize("quantization", [SMOOTH, STATIC], ids=str)
def test_smoothing_moves_outputs_less(loud_job: JobFile, quantization: dict[str, Any]) -> None:
    plain = lines_of(loud_job("plain", {**quantization, "method": "rtn"}))[:7]
    smooth = lines_of(loud_job("smooth", quantization))[:7]
    for before, after in zip(plain, smooth, strict=True):  # of the first block: the same inputs
        leaf = after["layer"].rpartition(".")[2]
        if leaf in ("o_proj", "down_proj"):  # no norm stands before them
            assert (after["alpha"], after["smoothed_in"]) == (None, None)
        else:
            assert 0 <= after["alpha"] <= 1
            assert after["smoothed_in"].endswith("layernorm")
            assert after["relative_output_error"] < 0.8 * before["relative_output_error"]
        assert after["method"] == "smoothquant"


def test_a_fixed_alpha_is_taken(loud_job: JobFile) -> None:
    for line in lines_of(loud_job("job", {**SMOOTH, "smoothquant": HALF})):
        assert line["alpha"] == (0.5 if line["smoothed_in"] else None)


def test_gptq_on_smoothed_weights(loud_job: JobFile) -> None:
    rounded = lines_of(loud_job("rounded", SMOOTH))[:7]
    solved = lines_of(loud_job("solved", {**SMOOTH, "smoothquant": {"rounding": "gptq"}}))[:7]
    assert all(line["damping"] == 0.01 for line in solved)
    assert all(line["damping"] is None for line in rounded)
    assert [line["alpha"] for line in solved] == [line["alpha"] for line in rounded]
    total = [sum(line["relative_output_error"] for line in lines) for lines in (rounded, solved)]
    assert total[1] < total[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [{"match": "*.self_attn.[qkv]_proj", "skip": True}],
        [{"match": "*.self_attn.[qkv]_proj", "method": "rtn"}],
    ],
    ids=["skipped", "rounded"],
)
def test_a_norm_with_a_reader_that_is_not_smoothed_stays_as_it_is(
    loud_job: JobFile, loud_model: Path, overrides: list[dict[str, Any]]
) -> None:
    result = run_here(loud_job("job", {**SMOOTH, "overrides": overrides}))
    source = load_file(loud_model / "model.safetensors")
    files = (Path(result.store) / "model").glob("block-*.safetensors")
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    for index in range(3):
        kept = f"model.layers.{index}.input_layernorm.weight"
        changed = f"model.layers.{index}.post_attention_layernorm.weight"
        assert torch.equal(tensors[kept], source[kept])
        assert not torch.equal(tensors[changed], source[changed])
        assert tensors[changed].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[dict[str, dict[str, bytes]]]:
    yield {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "quantization",
    [STATIC, {**SMOOTH, "smoothquant": {"rounding": "gptq"}}],
    ids=["static", "gptq"],
)
def test_any_number_of_workers_and_any_losses_give_the_same_bytes(
    loud_job: JobFile,
    undisturbed: dict[str, dict[str, bytes]],
    quantization: dict[str, Any],
    seed: int,
) -> None:
    key = str(quantization)
    if key not in undisturbed:
        undisturbed[key] = model_bytes(run_here(loud_job("whole", quantization)).store)
    if seed == 0:
        store = run_here(loud_job("three", quantization), workers=3).store
    else:
        kills = schedule(seed, blocks=3)
        result = run_job(
            check(loud_job(f"seed-{seed}", quantization)),
            lambda plan: KillingExecutor(plan, 2, kills),
            Observer(),
        )
        store = result.store
    assert model_bytes(store) == undisturbed[key]


AT_INPUT = {"without_norm": "input_factor"}
NATIVE: dict[str, Any] = {"format": "native"}


@pytest.mark.parametrize(
    "quantization",
    [
        {**SMOOTH, "smoothquant": AT_INPUT},
        {**STATIC, "smoothquant": {**AT_INPUT, "alpha": 0.5, "rounding": "gptq"}},
    ],
    ids=str,
)
def test_factors_stay_on_inputs_where_no_norm_takes_them(
    loud_job: JobFile, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    output = {"store": str(tmp_path / "store"), **NATIVE}
    result = run_here(loud_job("job", quantization, output=output), workers=2)
    for line in result.report["layers"]:
        no_norm = line["layer"].rpartition(".")[2] in ("o_proj", "down_proj")
        place = line["smoothed_in"]
        assert place == "inputs" if no_norm else place.endswith("layernorm")
        assert 0 < line["relative_output_error"] < 0.2
    fetch(open_store(result.store), tmp_path / "out")
    source = Path(check(loud_job("again", quantization, output=output)).spec.model.path)
    ids_BL = torch.arange(2, 34)[None]
    with torch.no_grad():
        ours: Tensor = load(tmp_path / "out", torch.float32)(ids_BL).logits
    original = served(source, ids_BL)
    leaving = run_here(loud_job("leaving", {**quantization, "smoothquant": {}}))
    fetch(open_store(leaving.store), tmp_path / "leaving")
    assert (ours - original).norm() < 1.2 * (served(tmp_path / "leaving", ids_BL) - original).norm()
    worse = sum(line["relative_output_error"] for line in leaving.report["layers"][:7])
    assert sum(line["relative_output_error"] for line in result.report["layers"][:7]) < worse


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int4", "group_size": 32},
        {"scheme": "int4", "symmetric": False, "group_size": 64},
        {"scheme": "int8_static"},
        {"scheme": "int8", "symmetric": False},
    ],
    ids=str,
)
def test_both_formats_hold_the_same_model(
    loud_job: JobFile, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    ids_BL = torch.arange(2, 34)[None]
    logits = []
    for form in ("native", "compressed-tensors"):
        output = {"store": str(tmp_path / form), "format": form}
        result = run_here(loud_job("job", quantization, output=output))
        fetch(open_store(result.store), tmp_path / f"out-{form}")
        with torch.no_grad():
            logits.append(load(tmp_path / f"out-{form}", torch.float32)(ids_BL).logits)
    assert (logits[0] - logits[1]).abs().median() < 0.02 * logits[1].std()


def test_a_native_artifact_is_evaluated(loud_job: JobFile, text_file: Path, tmp_path: Path) -> None:
    output = {"store": str(tmp_path / "store"), **NATIVE}
    evaluation = {"text": str(text_file), "max_characters": 2000, "length": 128}
    job = loud_job("job", {"scheme": "int8"}, output=output, evaluation=evaluation)
    metrics = run_here(job).report["evaluation"]
    name = "word_perplexity"
    assert metrics["quantized"]["text"][name] == pytest.approx(
        metrics["original"]["text"][name], rel=0.05
    )


def test_a_group_may_mix_what_rounds_activations_with_what_does_not(
    loud_job: JobFile, tmp_path: Path
) -> None:
    """Nothing is solved, so there is no Hessian: all errors are told by the sample."""
    quantization = {
        "scheme": "int8_dynamic",
        "method": "rtn",
        "overrides": [{"match": "*.k_proj", "scheme": "int8", "method": "rtn"}],
    }
    output = {"store": str(tmp_path / "store"), **NATIVE}
    lines = lines_of(loud_job("job", quantization, output=output))
    errors = {line["layer"].rpartition(".")[2]: line["relative_output_error"] for line in lines[:7]}
    assert 0 < errors["k_proj"] < errors["q_proj"] < 0.2


@pytest.mark.parametrize("damage", ["cut", "version", "unknown scheme", "tensor gone"])
def test_a_damaged_native_artifact_is_no_traceback(
    loud_job: JobFile, tmp_path: Path, damage: str
) -> None:
    output = {"store": str(tmp_path / "store"), **NATIVE}
    result = run_here(loud_job("job", {"scheme": "int8"}, output=output))
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    block = next(out.glob("block-00001.*"))
    config = json.loads((out / "config.json").read_text())
    if damage == "cut":
        block.write_bytes(block.read_bytes()[:2000])
    elif damage == "version":
        config["quantization_config"]["version"] = 99
    elif damage == "unknown scheme":
        config["quantization_config"]["schemes"][0]["name"] = "int5"
    else:
        tensors = load_file(block)
        save_file({k: v for k, v in tensors.items() if "input_layernorm" not in k}, block)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=str(out)):
        load(out, torch.float32)
