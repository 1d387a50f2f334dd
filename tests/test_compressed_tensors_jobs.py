"""All that compressed-tensors carries, from a job file to what transformers computes with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.fetch import fetch
from quantcore.activations import fake_quantize
from quantcore.formats import FORMATS
from quantcore.schemes import SCHEME_KINDS, Scheme, every_form
from tests.test_orchestrator_job import JobFile, run_here
from tests.test_scheme_jobs import most, section
from workers.store import open_store

FORMAT = FORMATS["compressed-tensors"]
PROMPT = torch.arange(2, 34)[None]
FORMS = [
    scheme
    for name in SCHEME_KINDS
    for scheme in every_form(name, [32])
    if not FORMAT.refusal("Linear", scheme)
]


def artifact(
    job_file: JobFile, tmp_path: Path, quantization: dict[str, Any], **sections: Any
) -> tuple[Path, dict[str, Scheme]]:
    """A job's folder, and the scheme of each linear as its report has it."""
    result = run_here(job_file(quantization=quantization, **sections))
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    labels = {scheme.label(): scheme for scheme in FORMS}
    return out, {line["layer"]: labels[line["scheme"]] for line in result.report["layers"]}


def by_transformers(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        logits: Tensor = model.eval()(PROMPT).logits
    return logits


def by_our_decode(source: Path, folder: Path, schemes: Mapping[str, Scheme]) -> Tensor:
    """The source's own model with decoded weights, activations rounded before each linear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    for name, scheme in schemes.items():
        parts = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(name)}
        module = model.get_submodule(name)
        module.weight.data = FORMAT.decode(parts, scheme, module.in_features)
        scale = float(parts["input_scale"]) if scheme.static else None
        module.register_forward_pre_hook(rounding(scheme, scale))
    with torch.no_grad():
        logits: Tensor = model(PROMPT).logits
    return logits


def rounding(scheme: Scheme, scale: float | None) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda _module, args: fake_quantize(args[0], scheme, scale)


def held_to_our_decode(folder: Path, source: Path, schemes: Mapping[str, Scheme]) -> float:
    """How far the logits are from the source's own, once they are known to be what we decode."""
    theirs, ours = by_transformers(folder), by_our_decode(source, folder, schemes)
    if all(s.activations is None or s.activations.symmetric for s in schemes.values()):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    else:
        # with a zero point the library rounds x / s + z and we x / s: a tie ends in another code
        assert (theirs - ours).norm() < 0.01 * ours.norm()
    plain = by_our_decode(source, folder, {})
    return float((theirs - plain).norm() / plain.norm())


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_transformers_computes_with_what_was_decoded(
    scheme: Scheme, job_file: JobFile, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out, schemes = artifact(job_file, tmp_path, section(scheme, "rtn"))
    assert set(schemes.values()) == {scheme}
    assert len(schemes) == 21
    assert 0 < held_to_our_decode(out, model_folder("llama"), schemes) < 4 * most(scheme)


HEAD = {"match": "lm_head", "method": "rtn"}
TENSOR = {"scheme": "float8_static", "group_size": "tensor"}
MIXED: dict[str, list[dict[str, Any]]] = {
    "skips": [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.mlp.down_proj", "skip": True},
    ],
    "head": [HEAD],
    "another-head": [{**HEAD, "scheme": "int8"}],
    "integers": [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.mlp.*", "scheme": "int8_dynamic"},
        {"match": "*.layers.2.self_attn.*", "group_size": "channel"},
    ],
    "floats": [
        {"match": "*.layers.0.*", "scheme": "float8"},
        {"match": "*.layers.1.self_attn.*", "scheme": "float8_dynamic"},
        {"match": "*.layers.1.mlp.*", **TENSOR},
        {"match": "*.layers.2.mlp.down_proj", "scheme": "int8_static"},
        {**HEAD, "scheme": "float8_dynamic", "group_size": "tensor"},
    ],
    "8da4w": [{"match": "*.mlp.*", "scheme": "int8_dynamic_int4"}],
}


@pytest.mark.parametrize("overrides", MIXED.values(), ids=MIXED)
def test_mixed_plans_load_too(
    overrides: list[dict[str, Any]],
    job_file: JobFile,
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    quantization = {"scheme": "int4", "group_size": 32, "method": "rtn", "overrides": overrides}
    out, schemes = artifact(job_file, tmp_path, quantization)
    assert 0 < held_to_our_decode(out, model_folder("llama"), schemes) < 1.2


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_an_asymmetric_scheme_may_skip(
    scheme: str, job_file: JobFile, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = [{"match": "*.layers.0.*", "skip": True}]
    quantization = {"scheme": scheme, "group_size": 32, "symmetric": False, "method": "rtn"}
    out, schemes = artifact(job_file, tmp_path, {**quantization, "overrides": overrides})
    assert len(schemes) == 14
    assert 0 < held_to_our_decode(out, model_folder("llama"), schemes) < 1.2
