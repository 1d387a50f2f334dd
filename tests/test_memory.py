"""Memory: what jobs take beside what was predicted; workers that run out of it go on.

Hidden states then move down, and the bytes stay the same.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.collecting
import workers.worker
from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from quantcore.errors import ResourceError
from tests.command import quantfleet_process
from tests.conftest import save_wide_model
from workers.blocks import run_block
from workers.shelf import Shelf

JobFile = Callable[..., Path]


class Notes(Observer):
    def __init__(self) -> None:
        self.places: list[str] = []

    def note(self, event: str, **facts: Any) -> None:
        if event == "memory ran out":
            self.places.append(facts["states_now_on"])


def _run(job: Path, observer: Observer | None = None) -> dict[str, bytes]:
    result = run_job(
        check(job), lambda plan: InProcessExecutor(plan, ["cpu"]), observer or Observer()
    )
    return {p.name: p.read_bytes() for p in (Path(result.store) / "model").iterdir()}


def _run_out(monkeypatch: pytest.MonkeyPatch, module: Any, at: set[int], error: Any) -> None:
    """The so-manieth forwards of a block find no memory."""
    calls = iter(range(10**9))

    def scarce(*args: Any) -> Any:
        if next(calls) in at:
            raise error
        return run_block(*args)

    monkeypatch.setattr(module, "run_block", scarce)


@pytest.mark.parametrize("module", [workers.worker, workers.collecting], ids=["advance", "collect"])
@pytest.mark.parametrize("error", [MemoryError("host"), torch.OutOfMemoryError("device")], ids=type)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_worker_makes_room_and_goes_on(
    job_file: JobFile, monkeypatch: pytest.MonkeyPatch, module: Any, error: Any, at: int
) -> None:
    """In the middle of a task, too: what it had done of it is not done twice."""
    whole = _run(job_file("whole"))
    _run_out(monkeypatch, module, {at}, error)
    notes = Notes()
    assert _run(job_file("short"), notes) == whole
    assert notes.places == ["disk"]


def test_when_there_is_no_room_left_the_job_ends_with_what_it_has(
    job_file: JobFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_out(monkeypatch, workers.worker, {9, 10}, MemoryError("no room"))
    job = job_file("short")
    with pytest.raises(ResourceError, match="cpu ran out of memory in Advance: no room"):
        _run(job)
    records = job.parent / "store" / "short" / "ledger"
    assert len(list(records.glob("block-*.json"))) == 2
    monkeypatch.undo()
    assert _run(job) == _run(job_file("whole"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shelf_gives_back_what_was_put(dtype: torch.dtype) -> None:
    shelf = Shelf(torch.device("cpu"))
    hidden = torch.randn(2, 3, 5).to(dtype)
    assert shelf.place == "host"
    assert shelf.lower()
    assert shelf.place == "disk"
    kept = shelf.put(hidden)
    assert torch.equal(shelf.get(kept), hidden)
    assert kept.data_ptr() != hidden.data_ptr()
    assert not shelf.lower()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_process_takes_no_more_than_predicted_and_not_much_less(
    job_file: JobFile, tmp_path: Path, dtype: str
) -> None:
    """Two worker processes on Hessians large enough to be seen beside the interpreter."""
    model = save_wide_model(tmp_path / "wide", inner=4096)
    quantization = {"scheme": "int4", "group_size": 32, "range": "minmax"}
    job = job_file(
        "job",
        model={"path": str(model)},
        quantization=quantization,
        compute_dtype=dtype,
        workers={"count": 2},
    )
    outcome = quantfleet_process("run", job, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)["report"]
    predicted, measured = (report["needs"]["host_bytes"][key] for key in ("predicted", "measured"))
    assert measured <= predicted <= 2.5 * measured
    assert measured > 900 * 2**20  # or there was nothing to see
    written = sum(f.stat().st_size for f in (tmp_path / "store").rglob("*") if f.is_file())
    assert written <= sum(report["plan"]["predicted"]["job"]["store_bytes"].values())


def test_hidden_states_may_wait_on_disk_from_the_start(job_file: JobFile) -> None:
    whole = _run(job_file("whole"))
    prepared = check(job_file("short"))
    plan = dataclasses.replace(prepared.plan, states_on="disk")
    prepared = dataclasses.replace(prepared, plan=plan)
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    assert {p.name: p.read_bytes() for p in (Path(result.store) / "model").iterdir()} == whole


def test_a_shelf_may_begin_further_down() -> None:
    shelf = Shelf(torch.device("cuda"), "host")
    assert shelf.place == "host"
    assert shelf.lower()
    assert shelf.place == "disk"
    assert not Shelf(torch.device("cpu"), "disk").lower()
