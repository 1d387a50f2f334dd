"""The worst block tried before a job: it tells what it took, and leaves no trace."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checks import Prepared, check
from orchestrator.driver import JobResult, run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from orchestrator.printing import probe_line
from orchestrator.probe import probe_task
from orchestrator.team import Team
from quantcore.errors import ResourceError

JobFile = Callable[..., Path]
PROBED = {"count": 1, "probe": True}


class Tasks(Observer):
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.lines: list[str] = []

    def finished(self, assignment: Any, result: Any) -> None:
        self.kinds.append(type(assignment.task).__name__)

    def note(self, event: str, **facts: Any) -> None:
        if event == "probed":
            self.lines.append(probe_line(facts))


def _run(prepared: Prepared, observer: Observer | None = None, workers: int = 1) -> JobResult:
    devices = [prepared.device] * workers
    start = lambda plan: InProcessExecutor(plan, devices)  # noqa: E731
    return run_job(prepared, start, observer or Observer())


def _files(store: str) -> dict[str, bytes]:
    """All of a job's folder but what tells times."""
    files = (path for path in Path(store).rglob("*") if path.is_file())
    told = {path.relative_to(store).as_posix(): path.read_bytes() for path in files}
    names = dict.fromkeys(told, b"")
    return names | {name: data for name, data in told.items() if name.startswith("model/")}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_probe_leaves_no_trace(job_file: JobFile, workers: int, dtype: str) -> None:
    plain = _run(check(job_file("plain", compute_dtype=dtype)), workers=workers)
    observer = Tasks()
    job = job_file("probed", compute_dtype=dtype, workers=PROBED)
    probed = _run(check(job), observer, workers)
    assert observer.kinds[0] == "Probe"
    assert observer.kinds.count("Probe") == 1
    assert _files(probed.store) == _files(plain.store)
    assert plain.report["probe"] is None
    facts = probed.report["probe"]
    assert facts["block"] == 0
    assert set(facts["seconds"]) == {"embed", "load", "collect", "advance", "solve"}
    assert facts["bytes"]["host"]["scaled"] >= facts["bytes"]["host"]["measured"] > 0
    assert facts["quantize_seconds"]["scaled"] > 0
    assert observer.lines[0].startswith("probe: block 0: embed ")


def test_the_first_of_equal_blocks_and_its_widest_group_is_tried(job_file: JobFile) -> None:
    prepared = check(job_file("job", workers=PROBED))
    task = probe_task(prepared)
    groups = prepared.plan.blocks[task.block].groups
    assert task.block == 0
    assert groups[task.group].in_features == max(group.in_features for group in groups)
    skipped = {"match": "*.layers.0.*", "skip": True}
    quantization = {"scheme": "int4", "group_size": 32, "overrides": [skipped]}
    assert probe_task(check(job_file("later", quantization=quantization))).block == 1


def test_a_job_that_would_not_fit_ends_before_it_is_begun(job_file: JobFile) -> None:
    prepared = check(job_file("large", workers=PROBED))
    ((chosen, admitted),) = prepared.team.parts
    tight = dataclasses.replace(
        prepared, team=Team(((chosen, dataclasses.replace(admitted, room=2**20)),))
    )
    observer = Tasks()
    with pytest.raises(ResourceError, match=r"^workers.probe: block 0 took .*host memory to "):
        _run(tight, observer)
    assert observer.kinds == ["Probe"]
    store = Path(prepared.plan.store)
    assert not store.exists() or not list(store.rglob("*"))


def test_there_is_nothing_to_try_without_a_calibration(job_file: JobFile) -> None:
    observer = Tasks()
    quantization = {"scheme": "int4", "group_size": 32, "method": "rtn"}
    job = job_file("plain", quantization=quantization, calibration=None, workers=PROBED)
    assert _run(check(job), observer).report["probe"] is None
    assert "Probe" not in observer.kinds


def test_the_report_has_what_was_predicted_beside_what_was(job_file: JobFile) -> None:
    needs = _run(check(job_file("job")), workers=2).report["needs"]
    assert needs["host_bytes"]["measured"] > 0
    assert needs["host_bytes"]["predicted"] > 0
    assert set(needs["workers"]) == {"0", "1"}
    for phase in ("survey", "quantize"):
        assert set(needs["seconds"][phase]) == {"predicted", "measured"}
        assert needs["seconds"][phase]["measured"] is not None
