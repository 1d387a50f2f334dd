"""Every scheme in every form, by every method that it takes, from a job file to a running model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.fetch import fetch
from quantcore.formats import native
from quantcore.schemes import SCHEME_KINDS, FloatGrid, IntegerGrid, Scheme, every_form
from tests.test_orchestrator_job import JobFile, run_here
from workers.loading import load
from workers.store import open_store

METHODS = ("rtn", "gptq", "hqq", "smoothquant")


def rows() -> Iterator[tuple[Scheme, str]]:
    for name in SCHEME_KINDS:
        for scheme in every_form(name, [32]):
            for method in METHODS:
                suits = {
                    "smoothquant": scheme.activations,
                    "hqq": isinstance(scheme.grid, IntegerGrid),
                }
                if suits.get(method, True):
                    yield scheme, method


def section(scheme: Scheme, method: str) -> dict[str, Any]:
    """The job file's words for a scheme."""
    words: dict[str, Any] = {"scheme": scheme.name, "method": method}
    words["group_size"] = scheme.group_size or scheme.span
    if not scheme.symmetric:
        words |= {"symmetric": False, "zero_point": scheme.zero_point}
    return words


def most(scheme: Scheme) -> float:
    """What a linear's output may be off by: e4m3 keeps three bits of a mantissa."""
    if isinstance(scheme.grid, FloatGrid):
        return 0.06
    return 0.05 if scheme.bits == 8 else 0.3


@pytest.mark.parametrize(
    ("scheme", "method"), rows(), ids=lambda value: value.label() if value in SCHEMES else value
)
def test_a_job_ends_in_a_model_that_computes(
    scheme: Scheme,
    method: str,
    job_file: JobFile,
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    result = run_here(
        job_file(
            quantization=section(scheme, method),
            output={"store": str(tmp_path / "store"), "format": "native"},
        )
    )
    lines = result.report["layers"]
    assert len(lines) == 21
    for line in lines:
        assert (line["scheme"], line["method"]) == (scheme.label(), method)
        assert 0 < line["relative_output_error"] < most(scheme), line
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    config = yaml.safe_load((out / "config.json").read_text())["quantization_config"]
    assert set(native.schemes_of(config).values()) == {scheme}
    prompt = torch.arange(2, 30)[None]
    quantized = load(out, torch.float32)(prompt).logits
    original = load(model_folder("llama"), torch.float32)(prompt).logits
    assert 0 < (quantized - original).norm() / original.norm() < 4 * most(scheme)


ROUNDING_INPUTS = [
    scheme for name in SCHEME_KINDS for scheme in every_form(name, [32]) if scheme.activations
]


@pytest.mark.parametrize("scheme", ROUNDING_INPUTS, ids=Scheme.label)
def test_transformers_rounds_activations_as_the_native_format_does(
    scheme: Scheme, job_file: JobFile, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """So that what is measured on one artifact is what the other serves."""
    prompt = torch.arange(2, 60)[None]
    logits = {"original": load(model_folder("llama"), torch.float32)(prompt).logits}
    for form in ("native", "compressed-tensors"):
        output = {"store": str(tmp_path / "store"), "format": form}
        job = job_file(form, quantization=section(scheme, "rtn"), output=output)
        fetch(open_store(run_here(job).store), tmp_path / form)
        logits[form] = load(tmp_path / form, torch.float32)(prompt).logits
    apart = (logits["native"] - logits["compressed-tensors"]).norm()
    lost = (logits["native"] - logits["original"]).norm()
    # exact but for inputs between two codes, which either may get
    assert apart < 0.1 * lost


SCHEMES = [scheme for scheme, _ in rows()]
