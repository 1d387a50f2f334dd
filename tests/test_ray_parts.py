"""Parts that stay with their maker, as a GPU's do: here on CPUs, on a real Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from orchestrator.ray_parts import Parts
from tests.command import quantfleet
from workers import gpus
from workers.arena import Placed, Region
from workers.kept import Near, Own

JobFile = Callable[..., Path]

_SCRIPT = """
import json, sys
from pathlib import Path
import psutil
from orchestrator import ray_executor
from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.loop import Observer
from orchestrator.ray_cluster import embedded
from orchestrator.ray_executor import RayExecutor, Wanted

facts = {"lost": [], "ways": []}
killed = []
kill = sys.argv[2] == "kill"
ray_executor.stays = lambda device: True

class Watch(Observer):
    def submitted(self, assignment, worker):
        if kill and not killed and assignment.id.startswith("solve/1/"):
            for child in psutil.Process().children(recursive=True):
                if child.name().startswith("ray::RayWorker"):
                    child.kill()
                    killed.append(child)
                    break
    def note(self, event, **told):
        if event == "worker lost":
            facts["lost"].append(told["why"])

class Told(ray_executor.Parts):
    def input_for(self, reader, assignment, part):
        given = super().input_for(reader, assignment, part)
        facts["ways"].append(type(given).__name__)
        return given

ray_executor.Parts = Told

def start(plan):
    wanted = Wanted(devices=("cpu", "cpu"), cpus=1)
    return RayExecutor(plan, wanted, embedded(cpus=2, gpus=0))

result = run_job(check(Path(sys.argv[1])), start, Watch())
facts["store"] = result.store
print(json.dumps(facts))
"""


def _run(job: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-c", dedent(_SCRIPT), str(job), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _model_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "model").iterdir()}


@pytest.mark.parametrize("fault", [pytest.param("none", marks=pytest.mark.slow), "kill"])
def test_parts_that_stay_give_the_same_bytes(job_file: JobFile, fault: str) -> None:
    plain = job_file("plain")
    assert quantfleet("run", "--in-process", plain).code == 0
    facts = _run(job_file("stay", workers={"count": 2}), fault)
    assert {"Own", "ObjectRef"} <= set(facts["ways"])
    assert bool(facts["lost"]) == (fault == "kill")
    assert _model_bytes(Path(facts["store"])) == _model_bytes(plain.parent / "store" / "plain")


class _Actor:
    """Tells how it was asked, in place of a reference."""

    def __getattr__(self, name: str) -> Any:
        return self if name == "options" else _Asked(name)

    def __call__(self, **options: Any) -> Any:
        return self


class _Asked:
    def __init__(self, name: str) -> None:
        self.name = name

    def options(self, **options: Any) -> Any:
        assert options == {"concurrency_group": "parts"}
        return self

    def remote(self, *args: Any) -> tuple[Any, ...]:
        return (self.name, *args)


@dataclass
class _Worker:
    number: int
    actor: Any
    node: str
    gpu: str
    sees: tuple[str, ...]


def test_who_reads_decides_the_way() -> None:
    maker = _Worker(0, _Actor(), "a", "gpu-0", ("gpu-0", "gpu-1"))
    beside = _Worker(1, _Actor(), "a", "gpu-1", ("gpu-1", "gpu-0"))
    blind = _Worker(2, _Actor(), "a", "gpu-2", ("gpu-2",))
    far = _Worker(3, _Actor(), "b", "gpu-0", ("gpu-0",))
    parts = Parts()
    parts.put("stored", ["ref"])
    placed = Placed(Region(5, 0, 256), (4,), torch.float32)
    parts.stay("kept", maker, (None, None, {"sum": placed}))
    assert parts.input_for(far, "stored", 0) == "ref"
    assert parts.input_for(maker, "kept", 2) == Own("kept", 2)
    new = parts.input_for(beside, "kept", 2)
    assert new == Near(0, {"sum": placed}, {5: ("lend", 5)})
    assert parts.input_for(beside, "kept", 2) == new, "it is not known to have been read"
    parts.read(beside, [new])
    assert parts.input_for(beside, "kept", 2) == Near(0, {"sum": placed}, {})
    assert parts.input_for(blind, "kept", 2) == parts.input_for(far, "kept", 2)
    assert parts.input_for(far, "kept", 2) == ("send", "kept", 2)
    parts.stay("on the host", maker, None)
    assert parts.input_for(beside, "on the host", 0) == ("send", "on the host", 0)
    assert not parts.lost(beside)
    assert parts.lost(maker)
    parts.release("kept")  # which is gone: nothing is asked of it


@pytest.mark.parametrize(
    ("own", "seen"), [("2", "2,0,1,3"), ("GPU-4f", "GPU-4f"), ("0,1", "0,1"), ("", "")]
)
def test_a_worker_sees_the_other_gpus_behind_its_own(
    own: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpus.see_others("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    gpus.see_others("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
