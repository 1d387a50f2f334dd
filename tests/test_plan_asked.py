"""What a job asks to be planned: what is refused, left out or known without measuring."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.plan import CandidateClass, NamedProfile, PlanSpec
from orchestrator import plan_left
from orchestrator.bag import Bag
from orchestrator.checks import check
from orchestrator.to_plan import check_to_plan
from quantcore.autoquant.candidates import CLASSES
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import Plan, parse
from quantcore.autoquant.options import PROFILES, Layer
from quantcore.errors import JobFaults, QuantfleetError
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.planning import DYNAMIC, INT8_LINEAR, made
from tests.plans import INT8, chosen_from, option
from tests.test_orchestrator_job import JobFile
from workers.sensed import keep, known, open_errors, tidy
from workers.tasks import Sense

PlanJob = Callable[..., Path]


def test_linears_that_overrides_speak_of_are_not_planned(job_to_plan: PlanJob) -> None:
    overrides = [
        {"match": "*.down_proj", "skip": True},
        {"match": "*.layers.1.self_attn.?_proj", "scheme": "int8"},
        {"match": "*.layers.0.self_attn.o_proj", "method": "hqq"},
    ]
    path = job_to_plan(sections={"quantization": {"overrides": overrides}})
    (plan,) = made(check_to_plan(path))
    names = plan.labels().keys()
    assert len(names) == 7 * BLOCKS - BLOCKS - 4
    assert "model.layers.0.self_attn.o_proj" in names
    assert check(path).planned is not None


def test_schemes_that_the_artifact_cannot_hold_are_no_candidates(job_to_plan: PlanJob) -> None:
    job = check_to_plan(job_to_plan(candidates=["int4"]))
    assert {scheme.symmetric for family in job.families for scheme in family.schemes} == {True}
    assert all(note.startswith("left out: int4 ") for note in job.notes[:2])
    native = job_to_plan("n", {"output": {"store": "./s", "format": "native"}}, candidates=["int4"])
    schemes = {scheme for family in check_to_plan(native).families for scheme in family.schemes}
    assert schemes == set(CLASSES["int4"])


def test_times_too_wide_to_tell_candidates_apart_are_warned_of() -> None:
    def plan(noise: float) -> Plan:
        options = tuple(
            option(label, us, 1, error, noise)
            for label, us, error in (("dense", 10, 0), (INT8, 9, 1), ("float8 channel plain", 8, 2))
        )
        return chosen_from([Layer(name="a", linears=("a",), options=options)], "time", Budgets())

    assert plan_left.facts(plan(0.05), "plan.json", "store")["noise"] is None
    warning = plan_left.facts(plan(2.0), "plan.json", "store")["noise"]
    assert warning.startswith("times are uncertain: most candidates tie for 1 of 1 layers, at ")


@pytest.mark.parametrize(
    ("sections", "plan", "message"),
    [
        ({"calibration": None}, {"rounding": "rtn"}, "calibration: a plan's errors are measured"),
        ({}, {"budgets": {"bytes": 9}}, "has 9 or less: write 116736 or more, the least that can"),
        ({}, {"candidates": ["int9"]}, "quantization.plan.candidates.0: Input should be 'default'"),
        ({}, {"profile": "decode"}, "quantization.plan.profile"),
        ({}, {"calls": [{"tokens": 1}, {"tokens": 1}]}, "a number of tokens stands twice"),
        ({}, {"held_out": "./none.txt"}, "quantization.plan.held_out: there is no file"),
        ({}, {"budgets": {"bytes": "4 GB"}}, "quantization.plan.budgets.bytes"),
        ({}, {"candidates": ["float8"], "rounding": "hqq"}, "take none of them: name others"),
        ({}, {"path": "a.json", "least": "error"}, "made already: drop least, or drop path"),
        ({"quantization": {"method": "rtn", "scheme": "int8"}}, {}, "plan is for method: plan"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(
    job_to_plan: PlanJob, sections: dict[str, Any], plan: dict[str, Any], message: str
) -> None:
    with pytest.raises((JobFaults, QuantfleetError)) as caught:
        check_to_plan(job_to_plan("bad", sections, **plan))
    said = caught.value.lines() if isinstance(caught.value, JobFaults) else [str(caught.value)]
    assert len(said) == 1
    assert message in said[0]
    assert caught.value.exit_code in (2, 3)


def test_a_job_without_a_plan_says_how_to_have_one(
    job_to_plan: PlanJob, job_file: JobFile, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = job_to_plan()
    message = refused(2, "run", path, "--in-process")
    assert "quantization.plan.path: there is no plan in " in message
    assert "run quantfleet plan with this job first" in message
    assert "no plan in" in refused(2, "plan", path, "--budget", "error=1")
    assert "method: gptq needs no plan" in refused(2, "plan", job_file("g"), "--in-process")
    assert "--least: write" in refused(2, "plan", path, "--least", "error")
    (tmp_path / "notes.json").write_text("{}")
    output = str(tmp_path / "notes.json")
    assert "is no plan" in refused(3, "plan", path, "--in-process", "--output", output)


def test_a_plan_for_what_the_job_asks_no_more_is_refused(
    job_to_plan: PlanJob, tmp_path: Path
) -> None:
    made(check_to_plan(job_to_plan()))
    for changed, why in (
        ({"budgets": {"error": 0.5}}, "was made for other budgets"),
        ({"least": "error"}, "has the least time, not the least error"),
        ({"profile": "mix"}, "was made for another profile"),
        ({"held_out": "a.txt"}, "was made without a held-out text"),
        ({"end_to_end": False}, "was made with plans run end to end"),
        ({"candidates": ["int4"]}, "has other candidates, as int8 sym channel"),
        ({"threads": 7}, "was made for 1 threads of a CPU, not for 7"),
    ):
        with pytest.raises(JobFaults, match=f"the plan in the job's folder {why}: run quantfleet"):
            check(job_to_plan(**changed))
    output = str(tmp_path / "other.json")
    outcome = quantfleet("plan", job_to_plan(), "--budget", "error=0.001", "--output", output)
    assert outcome.code == 0, outcome
    assert parse(Path(output).read_text()).choice.totals.error <= 0.001


def test_the_job_file_names_what_there_is() -> None:
    assert get_args(CandidateClass) == tuple(CLASSES)
    assert get_args(NamedProfile) == (*PROFILES, "recorded")
    assert PlanSpec.model_validate({"budgets": {"bytes": "1.5 KiB"}}).budgets.num_bytes() == 1536


def test_a_recorded_profile_is_what_the_calibration_hands_a_linear(job_to_plan: PlanJob) -> None:
    job = check_to_plan(job_to_plan(profile="recorded"))
    assert job.profile.calls == {32: 8}


def test_tasks_that_others_would_disturb_are_given_one_at_a_time() -> None:
    bag = Bag({name: Sense("", "", (), {}) for name in "ab"}, alone=True)
    for worker in (0, 1):
        bag.joined(worker, 1.0)
    first = bag.offer(0)
    assert first is not None
    assert bag.offer(1) is None
    bag.returned(first.id)
    again = bag.offer(1)
    assert again is not None
    bag.finished(again.id, 1.0)
    assert bag.offer(0) is not None


def test_errors_are_merged_in_any_order_and_files_of_no_use_are_named(tmp_path: Path) -> None:
    lines: list[str] = []
    store = open_errors(str(tmp_path), "key")
    keep(store, {"a": {INT8_LINEAR: 0.5}})
    keep(store, {"a": {INT8_LINEAR: 0.75, DYNAMIC: 0.25}, "b": {INT8_LINEAR: 1.0}})
    labels = {of.label(): of for of in (INT8_LINEAR, DYNAMIC)}
    assert known(store, labels, lines.append) == {
        "a": {INT8_LINEAR: 0.5, DYNAMIC: 0.25},
        "b": {INT8_LINEAR: 1.0},
    }
    files = store.list()
    assert len(files) == 2
    tidy(store)
    (kept,) = store.list()
    assert kept not in files
    all_known = known(store, labels, lines.append)
    assert all_known["a"] == {INT8_LINEAR: 0.5, DYNAMIC: 0.25}
    assert not lines
    of_no_use = {
        "0.json": b'{"version": 1, "errors": {"a": {"int8 sym channel": "0"}}, "divergences": {}}',
        "1.json": b'{"version": 0}',
        "2.json": b"[" * 100_000,
        "3.json": b"\xff\xfe\x00",
    }
    for name, data in of_no_use.items():
        store.put(name, data)
    assert known(store, labels, lines.append) == all_known
    assert [line.partition(": ")[0] for line in lines] == [
        f"{store.url}/{name} is ignored" for name in of_no_use
    ]
    assert "'0' is no error" in lines[0]
    assert "version 0 where this reads 1" in lines[1]
    keep(store, {"c": {INT8_LINEAR: 0.5}})
    tidy(store)
    assert {*of_no_use} < {*store.list()}, "what cannot be read is not thrown away"
