"""The same path on a CUDA device. Run with: pytest -m gpu"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.checks import check
from orchestrator.driver import JobResult, run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from orchestrator.scheduler import Assignment
from tests.conftest import ARCHITECTURES, save_wide_model
from workers.blocks import BlockModel, run_block
from workers.clock import DeviceTicks
from workers.sources import open_source
from workers.tasks import Collect

pytestmark = pytest.mark.gpu

JobFile = Callable[..., Path]


def run_on_gpu(job: Path, workers: int = 1) -> JobResult:
    prepared = check(job)
    assert prepared.device == "cuda"
    return run_job(prepared, lambda plan: InProcessExecutor(plan, ["cuda"] * workers), Observer())


def model_bytes(store: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((Path(store) / "model").iterdir())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_workers_on_one_kind_give_the_same_bytes(job_file: JobFile, dtype: str) -> None:
    stores = [
        run_on_gpu(job_file(f"w{n}", compute_dtype=dtype, workers={}), workers=n).store
        for n in (1, 2)
    ]
    assert model_bytes(stores[0]) == model_bytes(stores[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_counts_nowhere(job_file: JobFile, tmp_path: Path, dtype: str) -> None:
    """Each sixth of 40 sequences is padded; the last micro-batch has hardly a token."""
    rows = [[2 + n] * (32 if n % 6 else 5) for n in range(38)] + [[7], [8]]
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    calibration = {"jsonl": str(ids), "field": "ids", "sequences": 40, "length": 32, "short": "pad"}
    stores = []
    for workers in (1, 2):
        sections = {"calibration": calibration, "compute_dtype": dtype, "workers": {}}
        result = run_on_gpu(job_file(f"w{workers}", **sections), workers)
        assert {line["tokens"] for line in result.report["layers"]} == {sum(map(len, rows))}
        assert {line["dropped_tokens"] for line in result.report["layers"]} == {0}
        stores.append(result.store)
    assert model_bytes(stores[0]) == model_bytes(stores[1])


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int4", "group_size": 32},
        {"scheme": "int4", "group_size": 32, "symmetric": False},
        {"scheme": "int8_dynamic"},
        {"scheme": "int8_dynamic", "method": "smoothquant"},
        {"scheme": "int8_static", "method": "smoothquant", "smoothquant": {"alpha": 0.5}},
    ],
    ids=str,
)
def test_the_gpu_finds_solutions_as_good_as_the_cpus(
    job_file: JobFile, quantization: dict[str, object]
) -> None:
    errors = []
    for kind in ("cuda", "cpu"):
        job = job_file(kind, quantization=quantization, workers={"kind": kind})
        prepared = check(job)
        result = run_job(
            prepared, lambda plan, kind=kind: InProcessExecutor(plan, [kind]), Observer()
        )
        errors.append([line["relative_output_error"] for line in result.report["layers"]])
    # the first block sees the same inputs on both; later ones see other last bits
    for gpu, cpu in zip(errors[0][:7], errors[1][:7], strict=True):
        assert gpu == pytest.approx(cpu, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_equals_the_whole_model(
    model_folder: Callable[..., Path], name: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder(name)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to("cuda")
    ids_BL = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        expected = whole(ids_BL).logits
    model = BlockModel(open_source(folder), dtype, "cuda")
    inputs = model.embed(ids_BL)
    hidden_BLH = inputs.hidden_BLH
    for index, call in enumerate(inputs.calls):
        hidden_BLH = run_block(model.block(index), call, hidden_BLH)
    assert torch.equal(model.logits(ids_BL, hidden_BLH), expected)


def test_free_memory_of_a_device_is_told_without_a_context() -> None:
    """In a process of its own, which has not touched the device."""
    code = (
        "from workers.machine import look; import torch; m = look([]);"
        "print(m.device_free['cuda'][0], torch.cuda.get_device_properties(0).total_memory,"
        "*torch.cuda.mem_get_info(0))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    told, total, later, _ = map(int, done.stdout.split())
    assert later < told <= total  # a context was made after, and took something


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_takes_no_more_of_a_device_than_predicted(
    job_file: JobFile, tmp_path: Path, dtype: str
) -> None:
    model = save_wide_model(tmp_path / "wide", inner=8192)
    job = job_file(
        "job", model={"path": str(model)}, compute_dtype=dtype, workers={"probe": True, "count": 1}
    )
    report = run_on_gpu(job).report
    predicted, measured = (
        report["needs"]["device_bytes"][key] for key in ("predicted", "measured")
    )
    assert 2**30 < measured <= predicted <= 3 * measured
    probed = report["probe"]["bytes"]["device"]
    assert probed["measured"] <= probed["scaled"] <= predicted


@pytest.mark.parametrize("place", ["host", "disk"])
def test_hidden_states_may_wait_elsewhere_from_the_start(job_file: JobFile, place: str) -> None:
    whole = model_bytes(run_on_gpu(job_file("whole", workers={})).store)
    prepared = check(job_file("short", workers={}))
    plan = dataclasses.replace(prepared.plan, states_on=place)
    prepared = dataclasses.replace(prepared, plan=plan)
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cuda"]), Observer())
    assert model_bytes(result.store) == whole


def test_smoothing_gives_the_same_bytes_on_any_number_of_workers(job_file: JobFile) -> None:
    smooth = {"scheme": "int8_static", "method": "smoothquant", "smoothquant": {"rounding": "gptq"}}
    stores = [
        run_on_gpu(job_file(f"w{n}", quantization=smooth, workers={}), workers=n).store
        for n in (1, 2, 3)
    ]
    assert model_bytes(stores[0]) == model_bytes(stores[1]) == model_bytes(stores[2])


class _Collected(Observer):
    """The workers that ran texts through blocks."""

    def __init__(self) -> None:
        self.workers: set[int] = set()

    def submitted(self, assignment: Assignment, worker: int) -> None:
        if isinstance(assignment.task, Collect):
            self.workers.add(worker)


def test_a_gpu_and_a_core_share_a_job(job_file: JobFile) -> None:
    """The core would be in the way of the collecting, and is given none of it."""
    job = job_file("mixed", workers={"kind": "mixed"}, compute_dtype="bfloat16")
    observer = _Collected()
    prepared = check(job)
    assert prepared.plan.contract.kind == {"device": "mixed"}
    mixed = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu", "cuda"]), observer)
    alone = run_on_gpu(job_file("alone", workers={}, compute_dtype="bfloat16"))
    assert observer.workers == {1}
    errors = [
        [line["relative_output_error"] for line in result.report["layers"]]
        for result in (mixed, alone)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_statistics_of_one_kind_serve_on_another(job_file: JobFile, text_file: Path) -> None:
    texts = {"text": str(text_file), "sequences": 8, "length": 32, "keep_statistics": True}
    kept = check(job_file("kept", calibration=texts, workers={"kind": "cpu"}))
    store = run_job(kept, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer()).store
    result = run_on_gpu(job_file("later", calibration={"statistics": store}, workers={}))
    first = [line["relative_output_error"] for line in result.report["layers"][:7]]
    whole = run_on_gpu(job_file("whole", workers={})).report["layers"][:7]
    assert first == pytest.approx([line["relative_output_error"] for line in whole], rel=0.02)
    assert result.report["statistics"]["kind"]["device"] == "cpu"


def test_a_mark_passes_when_the_device_gets_there() -> None:
    ticks = DeviceTicks(torch.device("cuda"))
    start = ticks.now()
    torch.cuda._sleep(200_000_000)  # cycles
    end = ticks.now()
    assert not ticks.passed(end)
    ticks.wait(end)
    assert ticks.passed(start)
    assert ticks.seconds(start, end) > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_devices_time_is_in_the_profile(job_file: JobFile, dtype: str) -> None:
    result = run_on_gpu(job_file(compute_dtype=dtype, workers={}))
    profile = result.report["profile"]
    told = sum(profile["total"]["seconds"].values())
    assert told == pytest.approx(profile["wall_seconds"], rel=0.02)  # by two clocks
    for row in profile["blocks"]:
        assert {"read", "forward", "hessian", "factor", "solve", "pack"} <= set(row["seconds"])
        assert all(seconds >= 0 for seconds in row["seconds"].values())
    assert "read" in profile["total"]["hidden"]
