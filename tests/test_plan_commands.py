"""quantfleet plan: diff, explain, show, and another budget from what a plan holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan_files import read_plan
from quantcore.autoquant.choice import Budgets, Objective, choose
from quantcore.autoquant.document import Plan, written
from quantcore.autoquant.front import within
from quantcore.autoquant.options import Layer
from tests.command import quantfleet
from tests.plans import FLOAT8, H200, INT8, LAYERS, chosen_from, labels_of, option, plan_of
from tests.test_orchestrator_job import JobFile

Budget = Callable[..., Path]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Plan, str], Path]:
    def write(plan: Plan, name: str) -> Path:
        path = tmp_path / name
        path.write_text(written(plan))
        return path

    return write


PlanFile = Callable[[Plan, str], Path]


def plan_with(objective: Objective = "time", **budgets: float) -> Plan:
    return chosen_from(LAYERS, objective, Budgets(**budgets))


def facts_of(*args: str | Path) -> Any:
    outcome = quantfleet("plan", *args, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_diff_tells_the_layers_that_differ_with_the_costs_of_both(file: PlanFile) -> None:
    one, other = file(plan_with(error=2), "a.json"), file(plan_with(error=0.8), "b.json")
    facts = facts_of("diff", one, other)
    assert facts["layers"] == [
        {
            "layer": "block.o",
            "candidate": [FLOAT8, "dense"],
            "tie": False,
            "time_us": [4.25, 7],
            "num_bytes": [8, 16],
            "error": [0.5, 0],
        }
    ]
    assert facts["layers_alike"] == 1
    assert facts["totals"] == [
        {"time_us": 16.25, "num_bytes": 32, "error": 1.25},
        {"time_us": 19, "num_bytes": 40, "error": 0.75},
    ]
    assert facts["budgets"] == [{"error": 2}, {"error": 0.8}]
    assert facts["same_hardware"] is facts["same_profile"] is True
    text = quantfleet("plan", "diff", one, other).out
    assert "1 layers differ, 1 do not" in text
    assert "different hardware" not in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("block.o")]
    assert row == ["block.o", *FLOAT8.split(), "dense", "4.25", "7", "8", "16", "0.5", "0"]


def test_diff_of_plans_of_different_hardware_says_so(file: PlanFile) -> None:
    plan = plan_with(error=2)
    other = replace(plan, hardware=replace(H200, name="NVIDIA L40S"))
    one, two = file(plan, "a.json"), file(other, "b.json")
    assert facts_of("diff", one, two)["same_hardware"] is False
    text = quantfleet("plan", "diff", one, two).out
    assert "b.json: NVIDIA L40S, driver 570.1, " in text
    assert "made for different hardware: their times are of different machines" in text


def test_plans_that_join_linears_in_other_ways_are_compared_linear_by_linear(
    file: PlanFile,
) -> None:
    apart = plan_of({"block.q": INT8, "block.k": "dense", "block.o": FLOAT8, "block.x": INT8}, H200)
    facts = facts_of("diff", file(plan_with(error=2), "a.json"), file(apart, "b.json"))
    rows = {row["layer"]: (row["candidate"], row["time_us"]) for row in facts["layers"]}
    assert rows == {
        "block.k": ([INT8, "dense"], [None, 1]),
        "block.v": ([INT8, None], [None, None]),
        "block.x": ([None, INT8], [None, 1]),
    }


def test_explain_tells_every_candidate_and_what_speaks_against_it(file: PlanFile) -> None:
    path = file(plan_with(error=2, num_bytes=40), "a.json")
    facts = facts_of("explain", "block.o", "--plan", path)
    verdicts = {row["candidate"]: row["verdict"] for row in facts["options"]}
    assert facts["candidate"] == FLOAT8
    assert verdicts == {
        INT8: "a tie in time; more error",
        FLOAT8: "chosen",
        "dense": "slower",
    }
    assert facts["runner_up"]["label"] == INT8
    shared = facts_of("explain", "block.k", "--plan", path)
    assert shared["layer"] == "block.qkv"
    verdicts = {row["candidate"]: row["verdict"] for row in shared["options"]}
    assert verdicts["int4 sym g64 plain"] == "over the budget of error by 7.5"
    assert verdicts["dense"] == "over the budget of bytes by 16"
    text = quantfleet("plan", "explain", "block.qkv", "--plan", path).out
    assert text.startswith(f"block.qkv: {INT8}\none choice for block.q, block.k, block.v\n")
    assert "least time within bytes <= 40 and error <= 2" in text
    assert "runner-up: none, nothing else keeps the budgets" in text


def test_every_candidate_that_was_not_chosen_has_something_against_it(file: PlanFile) -> None:
    for objective in ("time", "error"):
        for budgets in ({}, {"error": 0.8}, {"num_bytes": 24}, {"time_us": 20.0}):
            path = file(chosen_from(LAYERS, objective, Budgets(**budgets)), "a.json")
            for name in ("block.qkv", "block.o"):
                facts = facts_of("explain", name, "--plan", path)
                verdicts = [row["verdict"] for row in facts["options"]]
                assert verdicts.count("chosen") == 1
                assert not any("a later name" in verdict for verdict in verdicts)


def test_a_tie_that_only_another_run_might_find_is_slower_in_this_one(file: PlanFile) -> None:
    near = [option(INT8, 4, 8, 1, noise=0.5), option(FLOAT8, 5.5, 8, 0.5, noise=0.5)]
    twin = option("int4 sym g64 plain", 4, 8, 1, noise=0.5)
    layer = Layer(name="block.o", linears=("block.o",), options=(*near, twin))
    path = file(chosen_from([layer], "time", Budgets()), "a.json")
    facts = facts_of("explain", "block.o", "--plan", path)
    assert {row["candidate"]: row["verdict"] for row in facts["options"]} == {
        "int4 sym g64 plain": "chosen",
        INT8: "a tie in time; the same otherwise, with a later name",
        FLOAT8: "slower, by less than another run might find",
    }


def test_a_plan_without_options_explains_what_it_has(file: PlanFile) -> None:
    path = file(replace(plan_with(error=2), measured=()), "a.json")
    facts = facts_of("explain", "block.o", "--plan", path)
    assert [row["verdict"] for row in facts["options"]] == ["chosen"]
    text = quantfleet("plan", "explain", "block.o", "--plan", path).out
    assert "what else was measured is not in this plan" in text


def test_show_sets_a_plan_beside_uniform_ones_and_other_budgets(file: PlanFile) -> None:
    path = file(plan_with(error=2), "a.json")
    facts = facts_of("show", path)
    assert facts["linears"] == {FLOAT8: 1, INT8: 3}
    assert facts["front"][-1]["time_us"] == 10.25
    text = quantfleet("plan", "show", path).out
    assert "3 linears int8 sym channel plain" in text
    assert "all dense" in text


@pytest.fixture
def job(job_file: JobFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Budget:
    monkeypatch.chdir(tmp_path)

    def write(plan: Plan) -> Path:
        (tmp_path / "old.json").write_text(written(plan))
        return job_file(quantization={"method": "plan", "plan": {"path": "old.json"}})

    return write


def test_another_budget_is_chosen_for_from_the_plan_that_a_job_names(
    job: Budget, tmp_path: Path
) -> None:
    old = plan_with(error=2)
    facts = facts_of(job(old), "--budget", "error=0.8")
    assert facts["plan"] == "plan-NVIDIA_H200.json"
    assert [row["candidate"] for row in facts["layers"]] == [[FLOAT8, "dense"]]
    new, _ = read_plan(str(tmp_path / "plan-NVIDIA_H200.json"))
    assert new == plan_with(error=0.8)
    point = within(old.front, Budgets(error=0.8))
    assert point is not None
    assert new.choice.totals == point.totals


@pytest.mark.parametrize(
    ("words", "objective", "budgets"),
    [
        (["bytes=40", "error=1.8"], "time", {"num_bytes": 40, "error": 1.8}),
        (["bytes=0.03125KiB"], "time", {"num_bytes": 32}),
        (["time_us=2e1"], "error", {"time_us": 20}),
    ],
)
def test_budgets_of_all_kinds_give_the_plan_that_measuring_would_have_given(
    job: Budget, words: list[str], objective: Objective, budgets: dict[str, float]
) -> None:
    args = [arg for word in words for arg in ("--budget", word)]
    # options may come first, too: the word job is still left out
    outcome = quantfleet(
        "plan", *args, "--least", objective, "--output", "new.json", job(plan_with(error=2))
    )
    assert outcome.code == 0, outcome
    assert outcome.err == "use it with plan: {path: new.json}\n"
    new, _ = read_plan("new.json")
    assert new.choice == choose(LAYERS, objective, Budgets(**budgets))
    assert new.front == chosen_from(LAYERS, objective, Budgets(**budgets)).front


def test_a_correction_of_mixed_plans_is_not_held_against_uniform_ones(job: Budget) -> None:
    plan = plan_with(error=6)
    corrected = replace(plan, choice=choose(LAYERS, "time", Budgets(error=6), correction=3.0))
    args = ("--budget", "error=1.8", "--output", "new.json")
    assert quantfleet("plan", job(corrected), *args).code == 0
    new, _ = read_plan("new.json")
    assert set(new.labels().values()) == {INT8}
    assert (new.choice.correction, new.choice.totals.error) == (1, 1.75)
    assert new.front == plan.front


@pytest.mark.parametrize(
    ("code", "args", "message"),
    [
        (2, [], "--budget: write one at least"),
        (2, ["--budget", "speed=1"], "cannot read 'speed=1': write error=0.5, bytes=4.5GiB or "),
        (2, ["--budget", "error=1GiB"], "cannot read 'error=1GiB'"),
        (2, ["--budget", "error"], "cannot read 'error'"),
        (2, ["--budget", "error=1", "--budget", "error=2"], "error stands twice: keep one"),
        (2, ["--budget", "bytes=1"], "budget of bytes: no plan has 1 or less: write 23 or more"),
        (3, ["--budget", "error=1", "--output", "old.json"], "old.json is there already: name"),
    ],
)
def test_budgets_that_cannot_be_are_refused(
    job: Budget, refused: Callable[..., str], code: int, args: list[str], message: str
) -> None:
    path = job(plan_with(error=2))
    assert message in refused(code, "plan", path, *args)


def test_what_is_no_plan_or_layer_ends_with_its_exit_code(
    file: PlanFile, job_file: JobFile, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = file(plan_with(error=2), "a.json")
    (tmp_path / "bad.json").write_text("{")
    missing = tmp_path / "missing.json"
    assert "plan: damaged" in refused(2, "plan", "diff", path, tmp_path / "bad.json")
    assert "cannot access 'missing.json'" in refused(3, "plan", "show", missing)
    message = refused(2, "plan", "explain", "block.x", "--plan", path)
    assert message.startswith("error: the plan has no layer 'block.x': write one of its 2, as ")
    plain = job_file("plain")
    message = refused(2, "plan", plain, "--budget", "error=1")
    assert "names no plan to choose from: write method: plan" in message
    bare = file(replace(plan_of(labels_of(1), H200), measured=()), "bare.json")
    quantization = {"method": "plan", "plan": {"path": str(bare)}}
    job = job_file("bare", quantization=quantization)
    message = refused(2, "plan", job, "--budget", "error=1")
    assert "does not tell what else was measured: plan anew" in message
