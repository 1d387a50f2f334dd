"""Workers that hang and do not die, on a real Ray: the job goes on and ends in the same bytes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.command import quantfleet

JobFile = Callable[..., Path]

# A process of its own: Ray is not to be started twice in one.
_HEAD = """
import json, os, signal, sys, time
from pathlib import Path
import psutil
from orchestrator import ray_executor
from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.loop import Observer
from orchestrator.patience import Patience
from orchestrator.ray_cluster import embedded
from orchestrator.ray_executor import RayExecutor, RayWorker, Wanted

facts = {"lost": []}
stopped = []

class Watch(Observer):
    def submitted(self, assignment, worker):
        at_submit(assignment)
    def note(self, event, **told):
        if event == "worker lost":
            facts["lost"].append(told["why"])

def at_submit(assignment): ...
"""
_STOPS = """
def at_submit(assignment):
    # both at once, in the midst of the second block
    if not stopped and assignment.id.startswith("collect/1/"):
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("ray::RayWorker"):
                child.suspend()
                stopped.append(child)

patience = Patience(silent_s=8)
"""
_HANGS = """
mark = Path(sys.argv[2])  # here: a worker has arguments of its own

class Hangs(RayWorker):
    def run(self, task, parts, inputs, staying=None):
        if type(task).__name__ == "Collect" and task.block == 1 and not mark.exists():
            mark.touch()
            time.sleep(3600)
        return super().run(task, parts, inputs, staying)

ray_executor.RayWorker = Hangs
patience = Patience(shortest_s=20, times_usual=5)
"""
_TAIL = """
def start(plan):
    wanted = Wanted(devices=("cpu", "cpu"), cpus=1, patience=patience)
    return RayExecutor(plan, wanted, embedded(cpus=2, gpus=0))

result = run_job(check(Path(sys.argv[1])), start, Watch())
facts["store"] = result.store
facts["left"] = [p.pid for p in stopped if p.is_running() and p.status() != "zombie"]
print(json.dumps(facts))
"""


def _run(script: str, *args: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", dedent(_HEAD + script + _TAIL), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _model_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "model").iterdir()}


@pytest.fixture
def undisturbed(job_file: JobFile) -> dict[str, bytes]:
    job = job_file("undisturbed")
    assert quantfleet("run", "--in-process", job).code == 0
    return _model_bytes(job.parent / "store" / "undisturbed")


def test_workers_that_are_stopped_are_killed_and_replaced(
    job_file: JobFile, undisturbed: dict[str, bytes]
) -> None:
    facts = _run(_STOPS, job_file("stopped", workers={"count": 2}))
    assert len(facts["lost"]) == 2
    assert all(why.startswith("it does not answer: ") for why in facts["lost"])
    assert facts["left"] == []
    assert _model_bytes(Path(facts["store"])) == undisturbed


def test_a_task_that_never_ends_costs_its_worker(
    job_file: JobFile, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    facts = _run(_HANGS, job_file("hangs", workers={"count": 2}), tmp_path / "mark")
    (why,) = facts["lost"]
    assert why.startswith("it hangs: ")
    assert " at collect/1/" in why
    assert _model_bytes(Path(facts["store"])) == undisturbed
