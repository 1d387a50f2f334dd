"""`plan: {each_kind: true}`: an artifact by every plan in a job's folder, from one calibration."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import orchestrator.driver
from orchestrator.checks import read_job
from orchestrator.driver import run_job
from orchestrator.each_kind import EachKind, check_each
from orchestrator.executors import InProcessExecutor
from orchestrator.to_plan import check_to_plan
from quantcore.autoquant.document import Plan, written
from quantcore.errors import JobFaults, SpecError
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.planning import mixed
from tests.plans import H200, INT4, INT8, here, labels_of, plan_of
from tests.test_orchestrator_job import JobFile, _Dies, model_bytes, run_here
from workers.store import open_store

OTHER = "job-NVIDIA_H200"
MINE = "job-" + "".join(c if c.isalnum() else "_" for c in here().full_name())
NEVER = "never"  # a task that no job has
CPU, GPU = labels_of(BLOCKS), labels_of(BLOCKS, INT8, INT4, INT8)  # rounded otherwise everywhere

EachJob = Callable[..., Path]


@pytest.fixture
def each_job(job_file: JobFile, tmp_path: Path) -> EachJob:
    """A job with plans in its folder: those given, or one for this CPU and one for an H200."""

    def write(
        *plans: Plan, name: str = "job", plan: Mapping[str, Any] | None = None, **sections: Any
    ) -> Path:
        for of in plans or (plan_of(CPU, error=1), plan_of(GPU, H200)):
            folder = tmp_path / "store" / name / "plan"
            folder.mkdir(parents=True, exist_ok=True)
            file = MINE if of.hardware.device == "cpu" else OTHER
            (folder / f"{file.removeprefix('job-')}.json").write_text(written(of))
        asked = {"each_kind": True, "profile": "decode_1", "candidates": ["default", "int4"]}
        quantization = {"method": "plan", "plan": {**asked, **(plan or {})}}
        quantization |= sections.pop("quantization", {})
        return job_file(name, quantization=quantization, **sections)

    return write


def looked_at(job: Path) -> EachKind:
    return check_each(*read_job(job))


def made(job: Path, *observers: Any) -> None:
    """One artifact for each observer, as the command makes them."""
    each = looked_at(job)
    each.begin()
    for artifact, observer in zip(each.artifacts, observers, strict=False):
        prepared = each.prepared(artifact)
        run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), observer)


def artifacts(store: Path) -> dict[str, dict[str, bytes]]:
    return {name: model_bytes(str(store / name)) for name in (MINE, OTHER)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_one_job_makes_an_artifact_by_every_plan_from_one_calibration(
    each_job: EachJob, job_file: JobFile, store: Path
) -> None:
    """The first is what it would be alone; the other what a job over its statistics makes."""
    outcome = quantfleet("run", each_job(), "--in-process", "--json")
    assert outcome.code == 0, outcome
    told = json.loads(outcome.out)["artifacts"]
    assert [facts["job"] for facts in told] == [MINE, OTHER]
    assert [facts["predicted"]["num_bytes"] for facts in told] == [7 * BLOCKS] * 2
    assert [facts["inputs"] for facts in told] == [
        "calibrated: inputs came through its own quantized blocks",
        f"from statistics: inputs that came through the quantized blocks of {MINE}",
    ]
    assert not (store / OTHER / "ledger" / "calibration.jsonl").exists()

    def alone(name: str, of: str, **sections: Any) -> dict[str, bytes]:
        place = store / "job" / "plan" / f"{of.removeprefix('job-')}.json"
        plan = {"path": str(place), "other_hardware": True}
        job = job_file(name, quantization={"method": "plan", "plan": plan}, **sections)
        return model_bytes(run_here(job).store)

    ours = artifacts(store)
    assert ours[MINE] == alone("alone", MINE)
    assert ours[OTHER] != alone("calibrated", OTHER)
    statistics = {"calibration": {"statistics": str(store / MINE)}}
    assert ours[OTHER] == alone("over", OTHER, **statistics)


def test_the_texts_are_run_for_the_plan_that_loses_most(each_job: EachJob, store: Path) -> None:
    """Until its job has begun: then the others' inputs came through it, whatever plans come."""
    plans = plan_of(CPU, error=0.5), plan_of(GPU, H200, error=0.75)
    assert [one.spec.name for one in looked_at(each_job(*plans)).artifacts] == [OTHER, MINE]
    made(each_job(*plans), _Dies(NEVER))
    later = looked_at(each_job(plan_of(CPU, error=9)))
    assert [one.spec.name for one in later.artifacts] == [OTHER, MINE]


def test_the_summary_names_each_artifact_its_plan_and_how_to_fetch_it(
    each_job: EachJob, store: Path, tmp_path: Path
) -> None:
    outcome = quantfleet("run", each_job(), "--in-process")
    assert outcome.code == 0, outcome
    for name in (MINE, OTHER):
        assert f"quantfleet fetch {store / name} ./out" in outcome.out
        assert f"plan      {store / 'job' / 'plan' / name.removeprefix('job-')}.json" in outcome.out
    assert f"made for  {H200.label()}" in outcome.out
    assert "no whole model was checked" in outcome.out
    assert f"2 of 2: {OTHER}" in outcome.err

    status = quantfleet("status", store / "job").out.splitlines()
    assert status == [f"{n}: finished, 3 of 3 blocks" for n in sorted((MINE, OTHER))]
    assert sorted(quantfleet("list", store).out.splitlines()) == status
    refused = quantfleet("fetch", store / "job", tmp_path / "out")
    assert (refused.code, "an artifact for each kind" in refused.err) == (3, True)
    assert quantfleet("fetch", store / OTHER, tmp_path / "out").code == 0
    again = quantfleet("run", each_job(), "--in-process")
    assert (again.code, again.out.count("(finished already)")) == (0, 2)


@pytest.mark.parametrize("dies_at", [("publish/1", ""), ("", "quantize/1"), ("",)])
def test_interrupted_anywhere_it_is_resumed_from_the_store_alone(
    each_job: EachJob, store: Path, text_file: Path, tmp_path: Path, dies_at: tuple[str, ...]
) -> None:
    """In the first artifact, in the second, and between the two; texts and job file are gone."""
    text = tmp_path / "gone.txt"
    shutil.copy(text_file, text)
    texts = {"calibration": {"text": str(text), "sequences": 8, "length": 32}}
    made(each_job(**texts), _Dies(NEVER), _Dies(NEVER))
    whole = artifacts(store)
    shutil.rmtree(store)

    job = each_job(**texts)
    observers = [_Dies(task or NEVER) for task in dies_at]
    if any(dies_at):
        with pytest.raises(KeyboardInterrupt):
            made(job, *observers)
    else:
        made(job, *observers)
    assert not (store / OTHER / "manifest.json").exists()
    text.unlink()
    job.unlink()
    assert "unfinished" in (s := quantfleet("status", store / "job").out) or "not begun" in s
    outcome = quantfleet("resume", store / "job", "--in-process")
    assert outcome.code == 0, outcome
    assert artifacts(store) == whole


def test_before_the_first_has_begun_nothing_is_fixed(each_job: EachJob, store: Path) -> None:
    """It is resumed from its record; the texts are not in the store yet, and must be there."""
    with pytest.raises(KeyboardInterrupt):
        made(each_job(), _Dies("survey"))
    assert not (store / MINE).exists()
    status = quantfleet("status", store / "job").out.splitlines()
    assert status == [f"{name}: not begun" for name in sorted((MINE, OTHER))]
    assert quantfleet("resume", store / "job", "--in-process").code == 0
    assert (store / OTHER / "manifest.json").exists()


def test_plans_and_artifacts_in_s3_are_taken_up_from_there(
    each_job: EachJob, bucket: str, store: Path
) -> None:
    made(each_job(), _Dies(NEVER), _Dies(NEVER))
    far = f"{bucket}/artifacts"
    for plan in (store / "job" / "plan").iterdir():
        open_store(f"{far}/job").put(f"plan/{plan.name}", plan.read_bytes())
    made(each_job(output={"store": far}), _Dies(NEVER))
    assert quantfleet("resume", f"{far}/job", "--in-process").code == 0
    for name in (MINE, OTHER):
        facts = [json.loads(open_store(f"{at}/{name}").get("manifest.json")) for at in (far, store)]
        files = [{k: v for k, v in f["files"].items() if k.startswith("model/")} for f in facts]
        assert files[0] == files[1]


def test_a_damaged_record_is_one_clear_error(each_job: EachJob, store: Path) -> None:
    made(each_job())
    for damaged in ("{", '{"spec": {}, "first": "../x"}', '{"first": "x"}'):
        (store / "job" / "ledger" / "each-kind.json").write_text(damaged)
        outcome = quantfleet("resume", store / "job")
        assert (outcome.code, "is not a job record" in outcome.err) == (3, True), outcome


def test_an_interruption_says_what_is_made_and_how_to_go_on(
    each_job: EachJob, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_job(*args)

    job = each_job()
    monkeypatch.setattr(orchestrator.driver, "run_job", interrupted)
    outcome = quantfleet("run", job, "--in-process")
    assert outcome.code == 130
    assert (
        "1 of 2 artifacts are made, and the blocks of others are kept; go on with: quantfleet "
        f"resume {store / 'job'}"
    ) in outcome.err
    assert quantfleet("run", job, "--in-process").code == 0
    assert len(calls) == 4  # the finished one is looked at, and not made again


def test_a_plan_that_comes_later_is_one_artifact_more(each_job: EachJob, store: Path) -> None:
    """Its kind may be planned though others' artifacts were made; theirs may not."""
    made(each_job(plan_of(GPU, H200)), _Dies(NEVER))
    assert quantfleet("status", store / "job").out == f"{OTHER}: finished, 3 of 3 blocks\n"
    kept = model_bytes(str(store / OTHER))
    check_to_plan(each_job(plan_of(CPU)))
    with pytest.raises(SpecError, match=f"{OTHER}: the job was begun, and follows the plan that"):
        check_to_plan(each_job(plan_of(CPU), workers={"kind": "mixed"}), look_at=mixed)
    made(each_job(), _Dies(NEVER), _Dies(NEVER))
    assert (artifacts(store)[OTHER], (store / MINE / "manifest.json").exists()) == (kept, True)
    assert not (store / MINE / "ledger" / "calibration.jsonl").exists()


def test_with_statistics_that_are_there_or_without_texts_none_is_first(
    each_job: EachJob, job_file: JobFile, store: Path, text_file: Path
) -> None:
    texts = {"text": str(text_file), "sequences": 8, "length": 32, "keep_statistics": True}
    kept = run_here(job_file("kept", calibration=texts)).store
    made(each_job(calibration={"statistics": kept}), _Dies(NEVER), _Dies(NEVER))
    reports = [json.loads((store / n / "report/report.json").read_text()) for n in (MINE, OTHER)]
    assert [report["statistics"]["job"] for report in reports] == ["kept", "kept"]
    job = each_job(plan={"rounding": "rtn"}, name="plain", calibration=None)
    outcome = quantfleet("run", job, "--in-process", "--json")
    assert {f["inputs"] for f in json.loads(outcome.out)["artifacts"]} == {"without texts"}


def test_a_dry_run_says_how_many_there_will_be(each_job: EachJob, store: Path) -> None:
    outcome = quantfleet("run", each_job(), "--in-process", "--dry-run")
    assert outcome.code == 0, outcome
    assert "2 artifacts, one for each plan: the texts are run once, through " in outcome.out
    assert sorted(path.name for path in store.iterdir()) == ["job"]


def faults_of(job: Path) -> list[tuple[str, str]]:
    with pytest.raises(JobFaults) as caught:
        looked_at(job)
    assert all(fault.line for fault in caught.value.faults)
    return [(fault.field, fault.message) for fault in caught.value.faults]


EACH = "quantization.plan.each_kind"
FLOAT_ZERO = labels_of(BLOCKS, mlp="int4 float-zero g32 plain")


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (plan_of(labels_of(BLOCKS + 1), H200), ": the plan names 'model.layers.3.mlp.down_proj'"),
        (plan_of(labels_of(BLOCKS, "int4 sym g128 plain"), H200), ": groups of 128 do not divide"),
        (plan_of(labels_of(BLOCKS, mlp="float8 channel plain"), H200), " has other candidates"),
        (replace(plan_of(GPU, H200), choice=plan_of(GPU).choice), None),
    ],
    ids=["model", "shape", "candidates", "fits"],
)
def test_nothing_starts_where_one_of_the_plans_does_not_fit(
    each_job: EachJob, of: Plan, message: str | None, store: Path
) -> None:
    job = each_job(plan_of(CPU), of)
    if message is None:
        assert len(looked_at(job).artifacts) == 2
        return
    ((field, said),) = faults_of(job)
    assert field == EACH
    assert said.startswith(f"the plan for {H200.label()}{message}"), said
    if "candidates" not in message:  # for which it is to be planned anew
        assert f"; or take {store}/job/plan/NVIDIA_H200.json away" in said
    assert quantfleet("run", job, "--in-process").code == 2
    assert [path.name for path in store.iterdir()] == ["job"]
    assert [path.name for path in (store / "job").iterdir()] == ["plan"]


def test_a_kind_whose_plan_leaves_all_dense_has_no_artifact(each_job: EachJob) -> None:
    """The model serves there as it is, which is no fault; unless it is so everywhere."""
    dense = plan_of(labels_of(BLOCKS, "dense", "dense"), H200)
    job = each_job(plan_of(CPU), dense)
    outcome = quantfleet("run", job, "--in-process", "--json")
    assert outcome.code == 0, outcome
    assert [facts["job"] for facts in json.loads(outcome.out)["artifacts"]] == [MINE]
    told = quantfleet("run", job, "--in-process").err
    assert f"no artifact for {H200.label()}: its plan leaves every linear dense" in told
    status = quantfleet("status", job.parent / "store" / "job").out
    assert status == f"{MINE}: finished, 3 of 3 blocks\n"
    other = each_job(dense, name="other")
    assert "the plan leaves every linear dense" in faults_of(other)[0][1]


def test_what_is_wrong_with_several_plans_and_with_the_job_is_told_at_once(
    each_job: EachJob,
) -> None:
    four = labels_of(BLOCKS + 1)
    job = each_job(plan_of(four), plan_of(four, H200), calibration={"text": "gone.txt"})
    fields = [field for field, _ in faults_of(job)]
    assert fields == ["calibration.text", EACH, EACH]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "plan.json"}, "and path names one: drop one of the two"),
        ({"other_hardware": True}, "for plans of other hardware, too: drop other_hardware"),
        ({"budgets": {"error": 1}}, "was made for other budgets: run quantfleet plan again"),
    ],
)
def test_what_each_kind_does_not_go_with(
    each_job: EachJob, keys: dict[str, Any], message: str
) -> None:
    if "path" in keys:
        keys = {**keys, "profile": "mix", "candidates": ["default"]}
    assert message in faults_of(each_job(plan=keys))[0][1]


def test_without_plans_or_beside_a_job_of_one_artifact_it_is_refused(
    job_file: JobFile, each_job: EachJob, refused: Callable[..., str], store: Path
) -> None:
    each = {"method": "plan", "plan": {"each_kind": True}}
    told = refused(2, "run", job_file("none", quantization=each), "--in-process")
    assert "there is no plan in" in told
    made(each_job(), _Dies(NEVER))
    assert "begun with plan.each_kind" in refused(2, "run", job_file("job"), "--in-process")
    run_here(job_file("one"))
    told = refused(2, "run", each_job(name="one"), "--in-process")
    assert "the job was begun, and follows one plan" in told


def test_a_name_that_leaves_no_room_for_the_kind_is_refused(each_job: EachJob) -> None:
    assert "write a shorter one" in faults_of(each_job(name="j" * 99))[0][1]
