"""quantfleet plan on a real Ray: workers that are killed, and a cluster of two kinds of nodes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantcore.autoquant.document import parse
from tests.command import finish, start, wait_for
from tests.test_cluster import OTHER_KIND, _cluster
from tests.test_orchestrator_job import model_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A process of its own: Ray is not to be started twice in one.
_SCRIPT = """
import json, sys
from pathlib import Path
import psutil
from orchestrator.loop import Observer
from orchestrator.plan_measuring import measured_plans
from orchestrator.ray_cluster import embedded
from orchestrator.ray_executor import RayExecutor, Wanted
from orchestrator.to_plan import check_to_plan
from quantcore.autoquant.race import Effort

facts = {"lost": 0, "killed": [], "tasks": []}

class Watch(Observer):
    def submitted(self, assignment, worker):
        kind = assignment.id.partition("/")[0]
        facts["tasks"].append(assignment.id)
        if kind not in facts["killed"]:
            facts["killed"].append(kind)
            for child in psutil.Process().children(recursive=True):
                if child.name().startswith("ray::RayWorker"):
                    child.kill()
    def note(self, event, **told):
        facts["lost"] += event == "worker lost"

def start(prepared):
    wanted = Wanted(devices=prepared.team.devices, cpus=1)
    return RayExecutor(prepared.plan, wanted, embedded(cpus=1, gpus=0))

job, short = check_to_plan(Path(sys.argv[1])), Effort(seconds=0.02)
(plan,) = measured_plans(job, start, Watch(), short, short)
facts["linears"] = len(plan.labels())
facts["kept"] = [end.plan for end in plan.ends if end.kept]
facts["options"] = sorted({option.label for layer in plan.measured for option in layer.options})
print(json.dumps(facts))
"""


def test_a_killed_worker_costs_its_task_and_no_more(job_file: Callable[..., Path]) -> None:
    """It is killed while errors are measured, during the first race, and when whole models run."""
    planned = {"calls": [{"tokens": 1}]}
    job = job_file(quantization={"method": "plan", "plan": planned}, compute_dtype="bfloat16")
    command = [sys.executable, "-c", _SCRIPT, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["killed"] == ["sense", "race", "prove"]
    assert facts["lost"] == 3
    tasks = facts["tasks"]
    assert tasks[:2] == ["sense/0", "sense/0~2"]
    assert sum(task.startswith("race/") for task in tasks) == 4 + 1, "a shape of four once more"
    proofs = [task for task in tasks if task.startswith("prove/")]
    assert proofs[1] == f"{proofs[0]}~2"
    assert len(facts["kept"]) == 1
    assert facts["linears"] == 21
    assert "dense" in facts["options"]


def test_nodes_of_two_kinds_are_each_timed_and_each_has_its_artifact(
    job_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of each is killed in its first race. The other kind's plan is not passed off."""
    monkeypatch.chdir(tmp_path)
    planned = {"calls": [{"tokens": 2}], "candidates": ["default"], "budgets": {"bytes": "120 KiB"}}
    sections: dict[str, Any] = {"workers": {"kind": "mixed", "count": 1}}
    sections["compute_dtype"] = "bfloat16"
    quantization = {"method": "plan", "plan": {**planned, "each_kind": True}}
    job = job_file(quantization=quantization, **sections)
    with _cluster(1) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=OTHER_KIND)
        address = ("--address", cluster.address)
        log = tmp_path / "log.jsonl"
        process = start("plan", job, *address, "--log-file", log)
        for number in (1, 2):
            wait_for(lambda number=number: _races_begun(log) >= number, process)
            _kill_workers()
            wait_for(lambda number=number: _events(log, "worker lost") == number, process)
        outcome = finish(process)
        assert outcome.code == 0, outcome
        places = sorted((tmp_path / "store" / "job" / "plan").iterdir())
        plans = [parse(place.read_text()) for place in places]
        kinds = {plan.hardware.instructions for plan in plans}
        assert len(kinds) == 2 and "DEFAULT" in kinds
        assert len({plan.choice.totals.time_us for plan in plans}) == 2, "each has its own times"
        ran = [{end.measured_us for end in plan.ends} for plan in plans]
        assert all(ran) and not ran[0] & ran[1], "each runs whole models of its own"
        again = finish(start("plan", job, *address, "--json", "--log-file", tmp_path / "2.jsonl"))
        assert (again.code, _events(tmp_path / "2.jsonl", "workers starting")) == (0, 0)
        assert [parse(place.read_text()) for place in places] == plans
        outcome = finish(start("run", job, *address, "--json"))
        assert outcome.code == 0, outcome
    told = json.loads(outcome.out)["artifacts"]
    assert {of["hardware"] for of in told} == {plan.hardware.label() for plan in plans}
    assert all(model_bytes(of["store"]) for of in told)
    (foreign,) = [place for place in places if "DEFAULT" in place.name]
    path = job_file("foreign", quantization={"method": "plan", "plan": {"path": str(foreign)}})
    refused = finish(start("run", path, "--in-process"))
    assert (refused.code, "plan: made for" in refused.err) == (4, True), refused


def _told(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _events(log: Path, name: str) -> int:
    return sum(event["event"] == name for event in _told(log))


def _races_begun(log: Path) -> int:
    """On how many kinds: workers of the next one start once its phase is told."""
    phases, begun = 0, set()
    for event in _told(log):
        phases += event["event"] == "phase" and event["name"] == "race"
        if event["event"] == "task started" and event["kind"] == "Race":
            begun.add(phases)
    return len(begun)


def _kill_workers() -> None:
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("ray::RayWorker"):
            child.kill()
