"""Whole jobs on small models, in one process."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checks import check
from orchestrator.driver import JobResult, run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from workers.kind import compute_dtype
from workers.machine import Machine, look
from workers.store import open_store

JobFile = Callable[..., Path]


def run_here(job: Path, workers: int = 1, observer: Observer | None = None) -> JobResult:
    prepared = check(job)
    return run_job(
        prepared,
        lambda plan: InProcessExecutor(plan, [prepared.device] * workers),
        observer or Observer(),
    )


def model_bytes(store: str) -> dict[str, bytes]:
    root = Path(store) / "model"
    return {p.name: p.read_bytes() for p in sorted(root.iterdir())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_two_and_three_workers_give_the_same_bytes(job_file: JobFile, dtype: str) -> None:
    jobs = {n: job_file(f"w{n}", compute_dtype=dtype) for n in (1, 2, 3)}
    stores = [run_here(job, workers=n).store for n, job in jobs.items()]
    first, *others = [model_bytes(store) for store in stores]
    assert len(first) > 4
    for other in others:
        assert other == first


@pytest.mark.parametrize(
    ("products", "dtype"), [("native", "bfloat16"), ("none", "float32"), (None, "float32")]
)
def test_a_calibration_runs_in_what_the_hardware_multiplies_fast(
    job_file: JobFile, products: str | None, dtype: str
) -> None:
    def look_at(paths: Sequence[str]) -> list[Machine]:
        here = look(paths)
        kind = {name: value for name, value in here.kinds["cpu"].items() if name != "bfloat16"}
        if products is not None:
            kind["bfloat16"] = products
        return [dataclasses.replace(here, kinds={"cpu": kind}, devices={"cpu": 2})]

    prepared = check(job_file(compute_dtype=None), look_at=look_at)
    assert prepared.plan.contract.compute_dtype == prepared.spec.compute_dtype == dtype
    asked = check(job_file(compute_dtype="float32"), look_at=look_at)
    assert asked.plan.contract.compute_dtype == "float32"


def test_cpus_evaluate_in_float32_whatever_they_calibrate_in(
    job_file: JobFile, text_file: Path
) -> None:
    evaluation = {"text": str(text_file), "max_characters": 300, "length": 32}
    told = {
        dtype: run_here(job_file(dtype, compute_dtype=dtype, evaluation=evaluation)).report
        for dtype in ("float32", "bfloat16")
    }
    originals = [report["evaluation"]["original"] for report in told.values()]
    assert originals[0] == originals[1]
    artifacts = [report["layers"] for report in told.values()]
    assert artifacts[0] != artifacts[1]


def test_of_several_kinds_all_must_multiply_bfloat16() -> None:
    native, none = {"bfloat16": "native"}, {"bfloat16": "none"}
    assert compute_dtype([native, native]) == "bfloat16"
    assert compute_dtype([native, none]) == "float32"


class _Dies(Observer):
    def __init__(self, task: str) -> None:
        self._task = task

    def finished(self, node: Any, result: Any) -> None:
        if node.id.startswith(self._task):
            raise KeyboardInterrupt


@pytest.mark.parametrize("task", ["outside", "publish/0", "solve/1", "publish/2"])
def test_a_job_that_died_goes_on_to_the_same_bytes(job_file: JobFile, task: str) -> None:
    whole = run_here(job_file("whole")).store
    job = job_file("broken")
    with pytest.raises(KeyboardInterrupt):
        run_here(job, observer=_Dies(task))
    assert not (Path(whole).parent / "broken" / "manifest.json").exists()
    resumed = run_here(job, workers=2).store
    assert model_bytes(resumed) == model_bytes(whole)


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int4", "group_size": 32},
        {"scheme": "int4", "group_size": 32, "symmetric": False},
        {"scheme": "int4", "group_size": "channel"},
        {"scheme": "int8"},
        {"scheme": "int8", "symmetric": False},
        {"scheme": "int8", "group_size": 32},
        {"scheme": "int8_dynamic"},
        {"scheme": "float8"},
        {"scheme": "float8", "group_size": "tensor"},
        {"scheme": "float8_dynamic"},
        {"scheme": "float8_dynamic", "group_size": "tensor"},
        {"scheme": "float8_static"},
        {"scheme": "int8_dynamic_int4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_transformers_loads_and_computes_what_was_published(
    job_file: JobFile, tmp_path: Path, quantization: dict[str, Any], method: str
) -> None:
    from transformers import AutoModelForCausalLM

    result = run_here(job_file(quantization={**quantization, "method": method}))
    out = tmp_path / "out"
    fetch(open_store(result.store), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = torch.arange(2, 10)[None]
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 12)
    assert len(result.report["layers"]) == 21
    for line in result.report["layers"]:
        assert line["method"] == method
        assert 0 < line["relative_output_error"] < 0.6, line


def test_gptq_moves_outputs_less_than_rounding(job_file: JobFile) -> None:
    quantization = {"scheme": "int4", "group_size": 32, "range": "minmax"}
    errors = {}
    for method in ("rtn", "gptq"):
        job = job_file(method, quantization={**quantization, "method": method})
        lines = run_here(job).report["layers"]
        errors[method] = [line["relative_output_error"] for line in lines]
    # the first block sees the same inputs under both methods
    assert all(g < r for g, r in zip(errors["gptq"][:7], errors["rtn"][:7], strict=True))


def test_a_finished_job_is_left_alone(job_file: JobFile) -> None:
    job = job_file()
    first = run_here(job)
    before = {p: p.stat().st_mtime_ns for p in Path(first.store).rglob("*")}
    again = run_here(job)
    assert again.already_finished
    assert {p: p.stat().st_mtime_ns for p in Path(first.store).rglob("*")} == before


def test_the_manifest_names_every_file_with_its_hash(job_file: JobFile) -> None:
    import hashlib

    store = Path(run_here(job_file()).store)
    manifest = json.loads((store / "manifest.json").read_text())
    on_disk = {p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file()}
    ledger = {name for name in on_disk if name.startswith("ledger/")}
    assert set(manifest["files"]) == on_disk - ledger - {"manifest.json"}
    for name, facts in manifest["files"].items():
        data = (store / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (facts["sha256"], facts["size"])
