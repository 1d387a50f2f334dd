"""Where a job's time went: what its workers told, what they did not, and whose it was."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from orchestrator.checks import check
from orchestrator.driver import JobResult, run_job
from orchestrator.executors import Result
from orchestrator.loop import Observer
from orchestrator.profile import PARTS, Profiler
from orchestrator.scheduler import Assignment
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.faults import Kill, KillingExecutor
from tests.test_orchestrator_job import JobFile, _Dies, run_here
from workers.layout import PICTURE, REPORT
from workers.tasks import Collect, CopyOutside, Settle, Task

NO_TEXTS = {"read", "solve", "pack", "write"}


def adds_up(profile: dict[str, Any], worker_seconds: float) -> None:
    rows = [*profile["blocks"], profile["outside"]]
    parts: dict[str, float] = {}
    for row in rows:
        assert set(row["seconds"]) <= set(PARTS)
        assert all(seconds >= 0 for seconds in [*row["seconds"].values(), *row["hidden"].values()])
        for part, seconds in row["seconds"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    assert profile["total"]["seconds"] == pytest.approx(parts, abs=1e-3)
    assert sum(parts.values()) == pytest.approx(worker_seconds, abs=1e-3)


def parts_of(profile: dict[str, Any], block: int) -> set[str]:
    return set(profile["blocks"][block]["seconds"])


def picture_of(result: JobResult) -> ET.Element:
    return ET.fromstring((Path(result.store) / PICTURE).read_bytes())


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_and_waiting_are_all_the_time_that_workers_were_there(
    job_file: JobFile, workers: int
) -> None:
    result = run_here(job_file(), workers)
    profile = result.report["profile"]
    assert json.loads((Path(result.store) / REPORT).read_text())["profile"] == profile
    assert profile["workers"] == workers
    assert profile["wall_seconds"] <= result.report["seconds"]["quantize"] + 0.01
    adds_up(profile, workers * profile["wall_seconds"])
    for block, row in enumerate(profile["blocks"]):
        assert row["block"] == block
        assert not row["earlier"]
        assert {*NO_TEXTS, "forward", "hessian", "factor", "waiting"} == set(row["seconds"])
        assert set(row["hidden"]) <= {"write"}
        assert 0 < row["wall_seconds"] <= row["ended_at_seconds"] - row["began_at_seconds"]
    began = [row["began_at_seconds"] for row in profile["blocks"]]
    assert began == sorted(began)
    assert len(picture_of(result).findall(".//*[@class='lane']")) == BLOCKS + 1


@pytest.mark.parametrize(
    ("quantization", "texts", "parts"),
    [
        ({"scheme": "int4", "group_size": 32, "method": "rtn"}, False, NO_TEXTS),
        ({"scheme": "int4", "group_size": 32, "method": "hqq"}, False, NO_TEXTS),
        ({"scheme": "int8_dynamic", "method": "rtn"}, True, {*NO_TEXTS, "forward", "hessian"}),
        ({"scheme": "int8_dynamic", "method": "smoothquant"}, True, {*NO_TEXTS, "hessian"}),
    ],
    ids=["rtn", "hqq", "int8_dynamic", "smoothquant"],
)
def test_each_method_has_the_parts_that_it_has(
    job_file: JobFile, quantization: dict[str, Any], texts: bool, parts: set[str]
) -> None:
    sections: dict[str, Any] = {} if texts else {"calibration": None}
    profile = run_here(job_file(quantization=quantization, **sections)).report["profile"]
    adds_up(profile, profile["wall_seconds"])
    for block in range(BLOCKS):
        assert parts <= parts_of(profile, block)
        assert "factor" not in parts_of(profile, block)
        assert texts == ("forward" in parts_of(profile, block))


def test_a_job_from_kept_statistics_reads_them_and_runs_no_forward(
    job_file: JobFile, text_file: Path
) -> None:
    texts = {"text": str(text_file), "sequences": 8, "length": 32, "keep_statistics": True}
    kept = run_here(job_file("kept", calibration=texts))
    profile = run_here(job_file("later", calibration={"statistics": kept.store})).report["profile"]
    adds_up(profile, profile["wall_seconds"])
    for block in range(BLOCKS):
        assert {*NO_TEXTS, "factor"} <= parts_of(profile, block)
        assert not {"forward", "hessian"} & parts_of(profile, block)


def test_what_is_shown_to_the_next_shard_is_told_to_the_blocks_it_passed(
    job_file: JobFile, text_file: Path
) -> None:
    texts = {"text": str(text_file), "sequences": 8, "length": 32, "shards": 2}
    profile = run_here(job_file(calibration=texts), workers=2).report["profile"]
    adds_up(profile, 2 * profile["wall_seconds"])
    assert all("forward" in parts_of(profile, block) for block in range(BLOCKS))


def test_blocks_of_an_earlier_run_are_shown_to_be(job_file: JobFile) -> None:
    job = job_file()
    with pytest.raises(KeyboardInterrupt):
        run_here(job, observer=_Dies("publish/1"))
    result = run_here(job)
    profile = result.report["profile"]
    adds_up(profile, profile["wall_seconds"])
    assert [row["earlier"] for row in profile["blocks"]] == [True, True, False]
    for row in profile["blocks"][:2]:  # chunks had to pass them once more
        assert set(row["seconds"]) <= {"read", "forward", "pack", "waiting"}
    assert "".join(picture_of(result).itertext()).count("published by an earlier run") == 2


@pytest.mark.parametrize("done", [False, True])
def test_the_time_of_a_lost_worker_is_lost_to_the_block_it_was_at(
    job_file: JobFile, done: bool
) -> None:
    kills = [Kill("Solve", 1, done, "gone")]
    result = run_job(check(job_file()), lambda plan: KillingExecutor(plan, 2, kills), Observer())
    profile = result.report["profile"]
    assert profile["workers"] == 3  # one after the other
    assert "lost" in parts_of(profile, 1)
    assert not any("lost" in parts_of(profile, block) for block in (0, 2))
    there = sum(profile["total"]["seconds"].values())
    assert profile["wall_seconds"] < there < 3 * profile["wall_seconds"]
    assert "lost" in "".join(picture_of(result).itertext())


def test_a_run_says_where_the_picture_is(job_file: JobFile) -> None:
    outcome = quantfleet("run", "--in-process", job_file("told"))
    assert outcome.code == 0, outcome
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("profile")]
    assert Path(line.split()[1]).name == "profile.svg"
    assert Path(line.split()[1]).is_file()


class Scene:
    """A profiler whose clock is moved by hand."""

    def __init__(self, workers: int) -> None:
        self.now = 100.0
        self.profiler = Profiler(lambda: self.now)
        self.profiler.begin(range(workers))

    def at(self, seconds: float) -> Profiler:
        self.now = 100.0 + seconds
        return self.profiler


def given(name: str, task: Task) -> Assignment:
    return Assignment(id=name, task=task)


def ended(assignment: Assignment, worker: int, *spent: tuple[int | None, str, float]) -> Any:
    rows = [{"block": block, "seconds": {part: s}, "hidden": {}} for block, part, s in spent]
    return assignment, Result(assignment.id, worker, summary={"spent": rows})


def test_what_a_worker_does_not_tell_was_waiting_and_outside_of_blocks() -> None:
    scene = Scene(2)
    collect = given("collect/0", Collect(0, (0,), (1,)))
    scene.at(1).submitted(collect, 0)
    scene.at(5).finished(*ended(collect, 0, (0, "forward", 3.5), (0, "waiting", 0.25)))
    scene.at(10).end()
    profile = scene.profiler.profile(1, ())
    assert profile["blocks"][0]["seconds"] == {"forward": 3.5, "waiting": 0.25}
    assert profile["outside"]["seconds"] == {"waiting": 20.0 - 3.75}
    assert profile["wall_seconds"] == 10.0


def test_the_clock_of_a_block_runs_while_anyone_has_a_task_of_it() -> None:
    scene = Scene(2)
    first, second = given("a", Collect(0, (0,), (1,))), given("b", Collect(0, (1,), (1,)))
    settle, other = given("settle", Settle(0)), given("c", Collect(1, (0,), (1,)))
    scene.at(1).submitted(first, 0)
    scene.at(2).submitted(second, 1)
    scene.at(4).finished(*ended(first, 0))
    scene.at(5).finished(*ended(second, 1))
    scene.at(5).submitted(other, 0)
    scene.at(7).submitted(settle, 1)
    scene.at(8).finished(*ended(settle, 1))
    scene.at(9).end()  # with a task under way that nobody needs any more
    begun, after, never = scene.profiler.profile(3, (2,))["blocks"]
    clock = ("wall_seconds", "began_at_seconds", "ended_at_seconds")
    assert [begun[name] for name in clock] == [4.0 + 1.0, 1.0, 8.0]
    assert [after[name] for name in clock] == [4.0, 5.0, 9.0]
    assert [never[name] for name in clock] == [0.0, None, None]
    assert never["earlier"]


def test_workers_come_and_go_and_what_is_told_late_still_counts() -> None:
    scene = Scene(2)
    collect, solve = given("collect/0", Collect(0, (0,), (1,))), given("collect/1", Settle(1))
    scene.at(0).submitted(collect, 0)
    scene.at(0).submitted(solve, 1)
    scene.at(2).finished(*ended(collect, 0, (0, "forward", 1.5)))
    scene.at(2).submitted(given("collect/2", Collect(1, (1,), (1,))), 0)
    scene.at(6).note("worker lost", worker=0)  # with half a second not told, and 4 after that
    scene.at(7).note("worker joined", worker=5)
    outside = given("outside", CopyOutside(1))
    scene.at(8).submitted(outside, 5)
    scene.at(9).finished(*ended(outside, 5, (None, "write", 1.0)))
    scene.at(10).end()
    account = given("account/1", Settle(1))
    scene.at(11).finished(*ended(account, 1, (1, "write", 10.0)))  # a device's time
    scene.at(11).note("worker joined", worker=6)
    scene.at(12).finished(*ended(account, 6))
    profile = scene.profiler.profile(2, ())
    assert profile["workers"] == 3
    assert profile["blocks"][0]["seconds"] == {"forward": 1.5}
    assert profile["blocks"][1]["seconds"] == {"write": 10.0, "lost": 4.5}
    assert profile["outside"]["seconds"] == {"write": 1.0, "waiting": 2.0}
    assert sum(profile["total"]["seconds"].values()) == 6.0 + 10.0 + 3.0


def test_a_task_that_came_back_without_its_inputs_does_not_hold_its_blocks_clock() -> None:
    scene = Scene(1)
    scene.at(1).submitted(given("solve/0", Collect(0, (0,), (1,))), 0)
    again = given("collect/1", Collect(1, (0,), (1,)))
    scene.at(3).submitted(again, 0)
    scene.at(4).finished(*ended(again, 0))
    scene.at(9).end()
    walls = [row["wall_seconds"] for row in scene.profiler.profile(2, ())["blocks"]]
    assert walls == [2.0, 1.0]
