"""Workers that run out of memory: hidden states move down, and the bytes stay the same."""

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
