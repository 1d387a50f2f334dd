"""What a job tells while it runs: events with ids, a timeline of tasks, metrics for Prometheus."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.timeline import timeline
from quantcore.errors import SourceError
from tests.command import quantfleet

JobFile = Callable[..., Path]

# In a process of its own: Ray is not to be started twice in one.
_SCRAPE = """
import os, sys, time, urllib.request
from orchestrator.executors import Result
from orchestrator.ray_cluster import embedded
from orchestrator.ray_metrics import RayMetrics
from orchestrator.scheduler import Assignment
from workers.tasks import Settle

ray = embedded(cpus=1, gpus=0)
metrics = RayMetrics(ray, "a-job")
metrics.note("workers started", present=2)
metrics.note("quantizing", blocks=30, done=4)
for block in (4, 5):
    done = Assignment(id=f"settle/{block}/0", task=Settle(block), shard=1)
    metrics.finished(done, Result(done.id, 0, 0.5))
metrics.note("worker lost", present=1)
port = ray.nodes()[0]["MetricsExportPort"]
page, end = "", time.monotonic() + 60
while "quantfleet_workers_lost" not in page and time.monotonic() < end:
    time.sleep(1)
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
print(page)
ray.shutdown()
"""


@pytest.fixture
def log(job_file: JobFile, tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    outcome = quantfleet("run", "--in-process", "--log-file", path, job_file("told"))
    assert outcome.code == 0, outcome
    return path


def test_every_event_names_its_job_and_every_task_its_block(log: Path) -> None:
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {event["job"] for event in events} == {"told"}
    finished = [event for event in events if event["event"] == "task finished"]
    blocks = {event["block"] for event in finished if event["kind"] in {"Collect", "Publish"}}
    assert blocks == {0, 1, 2}
    assert all(event["worker"] == 0 and event["seconds"] >= 0 for event in finished)
    assert len({event["task"] for event in finished}) == len(finished)
    assert not any("shard" in event for event in events)


def test_tasks_of_several_shards_name_theirs(
    job_file: JobFile, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    calibration = {"text": str(text_file), "sequences": 8, "length": 32, "shards": 2}
    job = job_file("sharded", calibration=calibration, workers={"count": 2})
    assert quantfleet("run", "--in-process", "--log-file", path, job).code == 0
    events = [json.loads(line) for line in path.read_text().splitlines()]
    tasks = [event for event in events if event["event"] in {"task started", "task finished"}]
    shard_of = {event["block"]: event["shard"] for event in tasks if event["kind"] == "Solve"}
    assert shard_of == {0: 0, 1: 1, 2: 1}
    assert {event["shard"] for event in tasks if event["kind"] == "Embed"} == {0}
    assert not any("shard" in event for event in tasks if event["kind"] == "Survey")
    traced = timeline(path)["traceEvents"]
    assert {e["args"]["shard"] for e in traced if e["cat"] == "publish"} == {0, 1}


def test_a_log_becomes_a_timeline(log: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert quantfleet("timeline", log, trace).code == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["cat"] for event in events} >= {"survey", "embed", "collect", "solve", "publish"}
    starts = [event["ts"] for event in events]
    assert starts == sorted(starts)
    # one worker does one thing at a time: only the clock's grain may make tasks touch
    for before, after in itertools.pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"] + 5_000


@pytest.mark.parametrize("text", ["", "no json", '{"event": "task finished"}', "[1]"])
def test_what_is_no_log_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    if text:
        with pytest.raises(SourceError, match="is not a log"):
            timeline(path)
    else:
        assert timeline(path) == {"traceEvents": []}


def test_a_log_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert quantfleet("timeline", tmp_path / "nope", tmp_path / "out").code == 3


def test_metrics_come_out_of_rays_exporter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRAPE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in done.stdout.splitlines() if "quantfleet" in line and 'job="a-job"' in line
    ]
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert all('shard="1"' in line for line in lines if "quantfleet_task" in line)
    assert values["ray_quantfleet_blocks_done"] == 6
    assert values["ray_quantfleet_blocks"] == 30
    assert values["ray_quantfleet_workers"] == 1
    assert values["ray_quantfleet_workers_lost_total"] == 1
    assert values["ray_quantfleet_tasks_total"] == 2
    assert values["ray_quantfleet_task_seconds_count"] == 2
