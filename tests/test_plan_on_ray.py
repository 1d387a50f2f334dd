"""quantfleet plan on a real Ray: a worker that is killed, and what it did is done by another."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

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

(plan,) = measured_plans(check_to_plan(Path(sys.argv[1])), start, Watch(), Effort(seconds=0.02))
facts["linears"] = len(plan.labels())
facts["options"] = sorted({option.label for layer in plan.measured for option in layer.options})
print(json.dumps(facts))
"""


def test_a_killed_worker_costs_its_task_and_no_more(job_file: Callable[..., Path]) -> None:
    """It is killed twice: while errors are measured, and during the first race."""
    planned = {"calls": [{"tokens": 1}]}
    job = job_file(quantization={"method": "plan", "plan": planned}, compute_dtype="bfloat16")
    command = [sys.executable, "-c", _SCRIPT, str(job)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["killed"] == ["sense", "race"]
    assert facts["lost"] == 2
    tasks = facts["tasks"]
    assert tasks[:2] == ["sense/0", "sense/0~2"]
    assert len(tasks) == 2 + 4 + 1, "four shapes, one of them once more"
    assert facts["linears"] == 21
    assert "dense" in facts["options"]
