"""quantfleet plan: measured on workers, kept, chosen for each kind of hardware, and followed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from jobs.plan import CandidateClass, NamedProfile, PlanSpec
from orchestrator import plan_left
from orchestrator.bag import Bag
from orchestrator.checks import Prepared, check
from orchestrator.executors import Arrival, InProcessExecutor, Loss, News, Result
from orchestrator.loop import Observer
from orchestrator.plan_measuring import measured_plans
from orchestrator.scheduler import Assignment
from orchestrator.to_plan import ToPlan, check_to_plan
from quantcore.activations import fake_quantize
from quantcore.autoquant.asking import weight_bytes
from quantcore.autoquant.candidates import CLASSES, candidates_of, refused, schemes_of
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.costs import measured
from quantcore.autoquant.document import Plan, parse
from quantcore.autoquant.measurements import Product
from quantcore.autoquant.options import PROFILES, Layer
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.timing import Bench
from quantcore.errors import JobFaults, QuantfleetError, ResourceError
from quantcore.schemes import Scheme
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.plans import INT8, chosen_from, here, option
from tests.test_orchestrator_job import JobFile, _Dies, model_bytes, run_here
from workers.machine import Machine, look
from workers.sensed import keep, known, open_errors, tidy
from workers.tasks import Race, Sense

CALLS = [{"tokens": 1, "times": 8}, {"tokens": 16}]
INT8_LINEAR, DYNAMIC = Scheme(name="int8"), Scheme(name="int8_dynamic")
EFFORT = Effort(seconds=0.02)
US = {"dense": 8.0, "int8": 4.0, "int8_dynamic": 2.0, "int4": 1.0}  # others 9
H200 = {"device": "cuda", "name": "NVIDIA H200", "torch": "2.11.0", "bfloat16": "native"}

PlanJob = Callable[..., Path]


class MadeUp(Bench):
    """Microseconds by scheme, for each row and token, the more on a CPU."""

    def __init__(self, times: float) -> None:
        super().__init__("cpu")
        self._times = times

    def num_bytes(self, candidate: Any, rows: int, columns: int, dtype: str) -> int:
        return weight_bytes(candidate, rows, columns, dtype)

    def stopwatch(self, product: Product) -> Stopwatch:
        scheme = product.candidate.scheme
        us = (
            self._times
            * US.get(scheme.name if scheme else "dense", 9.0)
            * product.rows
            * product.tokens
        )
        return lambda repeats: [us] * repeats


class Fleet(InProcessExecutor):
    """Workers that compute on this CPU, whatever they are said to be, and make up times."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.plan, ["cpu"] * len(prepared.team.devices))
        self._races: list[tuple[int, Assignment]] = []

    def submit(self, worker: int, assignment: Assignment) -> None:
        if isinstance(assignment.task, Race):
            self._races.append((worker, assignment))
        else:
            super().submit(worker, assignment)

    def next_news(self) -> News:
        if not self._races:
            return super().next_news()
        worker, assignment = self._races.pop(0)
        task = assignment.task
        assert isinstance(task, Race)
        bench = MadeUp(1.0 if task.hardware.device == "cuda" else 10.0)
        _, new = measured(task.spots, task.factors, task.known, bench, task.effort)
        return Result(assignment.id, worker, 0.0, {"timings": new})


class Lossy(Fleet):
    """Its first worker is lost with the first task of each kind; another one comes for it."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared)
        self._lost: set[str] = set()
        self._worker = 0
        self._anew: Any = None
        self._coming = False

    def submit(self, worker: int, assignment: Assignment) -> None:
        kind = assignment.id.partition("/")[0]
        if kind in self._lost:
            super().submit(worker, assignment)
        else:
            self._lost.add(kind)
            self._coming = True
            self._queue.clear()

    def next_news(self) -> News:
        if not self._coming:
            return super().next_news()
        if self._worker in self._workers:
            lost, self._worker = self._worker, self._worker + 1
            self._anew = self._workers.pop(lost)
            return Loss(lost, ResourceError("its process ended"))
        self._workers[self._worker] = self._anew
        self._coming = False
        return Arrival(self._worker)


class Asked(Observer):
    """What was asked of workers; dies once a task of that name is finished, or so far on."""

    def __init__(self, dies_at: str = "", progress: bool = False) -> None:
        self._dies_at, self._progress = dies_at, progress
        self.tasks: list[Any] = []

    def submitted(self, assignment: Assignment, worker: int) -> None:
        self.tasks.append(assignment.task)

    def progressed(self, assignment: Assignment, done: int, total: int) -> None:
        if self._progress:
            raise KeyboardInterrupt

    def finished(self, assignment: Assignment, result: Result) -> None:
        if self._dies_at and assignment.id.startswith(self._dies_at):
            raise KeyboardInterrupt

    def races(self) -> list[tuple[int, int]]:
        return [(t.spots[0].rows, t.spots[0].columns) for t in self.tasks if isinstance(t, Race)]

    def sensed(self) -> list[int]:
        return [block for t in self.tasks if isinstance(t, Sense) for block in t.blocks]


@pytest.fixture
def plan_job(job_file: JobFile) -> PlanJob:
    """`plan_job(candidates=[...])`: keys of the plan's section; `sections` for all others."""

    def write(name: str = "job", sections: dict[str, Any] | None = None, **plan: Any) -> Path:
        calls = {} if plan.keys() & {"path", "profile"} else {"calls": CALLS}
        quantization = {"method": "plan", "plan": {**calls, **plan}}
        sections = sections or {}
        quantization |= sections.get("quantization", {})
        return job_file(name, **{**sections, "quantization": quantization})

    return write


def made(job: ToPlan, observer: Observer | None = None) -> list[Plan]:
    """Planned and left in the store."""
    plans = list(measured_plans(job, Fleet, observer or Observer(), EFFORT))
    for plan in plans:
        plan_left.leave(
            job, plan, str(Path(job.folder).parent.parent / f"{plan.hardware.name}.json")
        )
    return plans


def refuse_to_start(prepared: Prepared) -> Any:
    raise AssertionError("workers were started, and there was nothing to measure")


def mixed(paths: Sequence[str]) -> list[Machine]:
    """This machine, and one with an H200."""
    here = look(paths)
    kinds = {"cuda": H200, "cpu": here.kinds["cpu"]}
    free = {"cuda": (80 << 30,)}
    return [
        here,
        replace(here, name="other", kinds=kinds, devices={"cuda": 1, "cpu": 1}, device_free=free),
    ]


def test_a_job_is_planned_from_yaml_and_followed_by_run(
    plan_job: PlanJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, with real times of this CPU; all that it prints is one JSON value."""
    monkeypatch.chdir(tmp_path)
    budgets = {"bytes": "200 KiB"}  # of such small products the dense one is the fastest
    job = plan_job(rounding="rtn", calls=[{"tokens": 1}], budgets=budgets)
    outcome = quantfleet("plan", job, "--in-process", "--json")
    assert outcome.code == 0, outcome
    (facts,) = json.loads(outcome.out)["plans"]
    local, stored = Path(facts["plan"]), Path(facts["store"])
    assert local.read_bytes() == stored.read_bytes()
    assert stored.parent == tmp_path / "store" / "job" / "plan"
    plan = parse(stored.read_text())
    names = [f"model.layers.{block}" for block in range(BLOCKS)]
    assert [layer.layer for layer in plan.choice.layers[:4]] == [
        f"{names[0]}.mlp.down_proj",
        f"{names[0]}.mlp.gate_proj+up_proj",
        f"{names[0]}.self_attn.o_proj",
        f"{names[0]}.self_attn.q_proj+k_proj+v_proj",
    ]
    assert len(plan.labels()) == 7 * BLOCKS
    assert facts["totals"]["num_bytes"] <= 200 << 10
    assert [of["label"] for of in facts["uniforms"] if not of["fits"]] == ["dense"]
    assert facts["errors"].endswith("no whole model was checked")

    report = run_here(job).report
    schemes = {line["layer"]: line["scheme"] for line in report["layers"]}
    taken = {name: label for name, label in plan.labels().items() if label != "dense"}
    assert schemes == {name: label.removesuffix(" plain") for name, label in taken.items()}
    manifest = json.loads((tmp_path / "store/job/manifest.json").read_text())
    assert f"plan/{stored.name}" in manifest["files"]
    text = quantfleet("plan", job, "--in-process")
    assert (text.code, "was begun, and follows the plan" in text.err) == (2, True)


def test_nothing_is_measured_twice(plan_job: PlanJob) -> None:
    (first,) = made(check_to_plan(plan_job("a")))
    again = list(measured_plans(check_to_plan(plan_job("b")), refuse_to_start, Observer(), EFFORT))
    assert again == [first]
    other = {"budgets": {"error": 0.001}, "least": "time"}
    (budgeted,) = measured_plans(
        check_to_plan(plan_job("c", **other)), refuse_to_start, Observer(), EFFORT
    )
    assert budgeted.choice.totals.error <= 0.001 < first.choice.totals.error

    asked = Asked()
    made(check_to_plan(plan_job("d", candidates=["default", "int4"])), asked)
    (sensed, *races) = asked.tasks
    assert {s.name for of in sensed.wanted.values() for s in of} == {"int4", "int8_dynamic_int4"}
    for race in races:
        assert {product.candidate.scheme for product in race.known} >= {None, DYNAMIC}


@pytest.mark.parametrize("dies_at", ["sense", "race"])
def test_what_was_measured_before_an_interruption_is_kept(plan_job: PlanJob, dies_at: str) -> None:
    job = check_to_plan(plan_job())
    before, after = Asked(dies_at), Asked()
    with pytest.raises(KeyboardInterrupt):
        made(job, before)
    (plan,) = made(job, after)
    assert sorted(before.sensed() + after.sensed()) == list(range(BLOCKS))
    assert len(before.races()) == (dies_at == "race")
    assert len({*before.races(), *after.races()}) == len(before.races() + after.races()) == 4
    (whole,) = made(check_to_plan(plan_job("whole")))
    assert whole == plan


def test_a_model_and_a_store_may_be_far_away(
    plan_job: PlanJob, bucket: str, upload: Callable[..., str], model_folder: Callable[..., Path]
) -> None:
    sections = {
        "model": {"path": upload(model_folder("llama"))},
        "output": {"store": f"{bucket}/artifacts"},
    }
    path = plan_job("far", sections)
    job = check_to_plan(path)
    (plan,) = measured_plans(job, Fleet, Observer(), EFFORT)
    place = plan_left.leave(job, plan, str(path.parent / "far.json"))
    assert place.startswith(f"{bucket}/artifacts/far/plan/")
    planned = check(path).planned
    assert planned is not None
    assert planned.plan == plan
    again = measured_plans(check_to_plan(path), refuse_to_start, Observer(), EFFORT)
    assert list(again) == [plan]


def test_what_a_lost_worker_was_doing_is_done_by_another(plan_job: PlanJob) -> None:
    job = check_to_plan(plan_job())
    asked = Asked()
    (plan,) = measured_plans(job, Lossy, asked, EFFORT)
    assert asked.sensed() == [0, 1, 2] * 2
    assert len(asked.races()) == 4 + 1
    (whole,) = made(check_to_plan(plan_job("whole", {"output": {"store": f"{job.folder}/w"}})))
    assert whole == plan


def test_a_block_that_was_measured_is_not_measured_again(plan_job: PlanJob) -> None:
    job = check_to_plan(plan_job())
    with pytest.raises(KeyboardInterrupt):
        made(job, Asked(progress=True))
    asked = Asked()
    made(job, asked)
    assert asked.sensed() == [1, 2]


def test_errors_are_those_of_the_whole_model_in_float64(
    plan_job: PlanJob, model_folder: Callable[..., Path]
) -> None:
    """All tokens of such a short calibration are in the sample; two workers share the blocks."""
    from transformers import AutoModelForCausalLM

    job = check_to_plan(plan_job(sections={"workers": {"count": 2}}))
    (plan,) = made(job)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    name = "model.layers.2.mlp.down_proj"
    linear, seen = model.get_submodule(name), []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    tokens = job.kinds[0].prepared.plan.tokens
    assert tokens is not None
    with torch.no_grad():
        model(torch.tensor(tokens, dtype=torch.int64))
    x_TI, weight_OI = seen[0].double(), linear.weight.detach()
    # codes in float32: the largest weight lies in the middle between two of them
    scale_O = 2 * weight_OI.abs().amax(1, keepdim=True) / 255
    q_OI = (weight_OI / scale_O).round().clamp(-128, 127).double() * scale_O.double()
    w_OI = weight_OI.double()
    (layer,) = [layer for layer in plan.measured if layer.linears == (name,)]
    for scheme in (INT8_LINEAR, DYNAMIC):
        served_TI = fake_quantize(x_TI.float(), scheme).double()
        (found,) = [of.error for of in layer.options if of.candidate.scheme == scheme]
        assert found == pytest.approx(_error(x_TI, served_TI, w_OI, q_OI), rel=1e-3)


def _error(x_TI: Tensor, served_TI: Tensor, w_OI: Tensor, q_OI: Tensor) -> float:
    y_TO = x_TI @ w_OI.t()
    off_T = (served_TI @ q_OI.t() - y_TO).square().sum(1)
    return float((off_T / y_TO.square().sum(1)).mean())


def test_kept_statistics_do_instead_of_texts(plan_job: PlanJob, job_file: JobFile) -> None:
    calibration = {"sequences": 8, "length": 32, "keep_statistics": True}
    text = check(job_file()).spec.calibration
    assert text is not None
    kept = run_here(job_file("kept", calibration={"text": str(text.text), **calibration})).store
    (by_text,) = made(check_to_plan(plan_job("text")))
    asked = Asked()
    job = check_to_plan(plan_job(sections={"calibration": {"statistics": kept}}))
    (by_statistics,) = made(job, asked)
    assert asked.sensed() == [0, 1, 2]
    for one, other in zip(by_text.measured[:4], by_statistics.measured[:4], strict=True):
        for mine, its in zip(one.options, other.options, strict=True):
            # of the first block, whose inputs are the same; of other tokens of it
            assert its.error == pytest.approx(mine.error, rel=0.2)


def test_each_kind_of_the_fleet_has_a_plan_and_a_job_follows_its_own(plan_job: PlanJob) -> None:
    sections = {"workers": {"kind": "mixed"}, "compute_dtype": "bfloat16"}
    path = plan_job(candidates=["default", "int4"], sections=sections, rounding="rtn")
    job = check_to_plan(path, look_at=mixed)
    assert [kind.hardware.device for kind in job.kinds] == ["cuda", "cpu"]
    asked = Asked()
    gpu, cpu = made(job, asked)
    assert asked.sensed() == [0, 1, 2], "errors are measured once"
    assert cpu.choice.totals.time_us > gpu.choice.totals.time_us
    layouts = {label.rpartition(" ")[2] for label in gpu.labels().values()}
    assert layouts != {label.rpartition(" ")[2] for label in cpu.labels().values()}

    prepared = check(path, look_at=mixed)
    assert prepared.planned is not None
    assert prepared.planned.plan == gpu
    note = prepared.notes[1]
    assert note.startswith("one artifact, by one plan: that for NVIDIA H200, ")
    assert cpu.hardware.label() in note
    path.write_text(path.read_text().replace("kind: mixed", "kind: cpu"))
    alone = check(path).planned
    assert alone is not None
    assert alone.plan == cpu


def test_a_job_is_taken_up_with_the_plan_that_it_was_begun_by(
    plan_job: PlanJob, tmp_path: Path
) -> None:
    path = plan_job("broken", rounding="rtn", candidates=["int4"])
    made(check_to_plan(path))
    with pytest.raises(KeyboardInterrupt):
        run_here(path, observer=_Dies("publish/0"))
    outcome = quantfleet("resume", tmp_path / "store" / "broken", "--in-process")
    assert outcome.code == 0, outcome
    assert outcome.err.startswith(f"schemes by a plan for {here().name}, ")
    whole = plan_job("whole", rounding="rtn", candidates=["int4"])
    made(check_to_plan(whole))
    assert model_bytes(run_here(whole).store) == model_bytes(str(tmp_path / "store" / "broken"))


def test_every_scheme_there_is_can_be_planned_and_checked(
    plan_job: PlanJob, text_file: Path
) -> None:
    native = {"output": {"store": "./s", "format": "native"}, "compute_dtype": "bfloat16"}
    job = check_to_plan(plan_job("n", native, candidates=["all"], held_out=str(text_file)))
    (plan,) = made(job)
    checked = {check.plan for check in plan.checks} - {"chosen"}
    assert {"int8_static sym channel", "float8_static tensor"} <= checked
    measured = {of.candidate.scheme for layer in plan.measured for of in layer.options}
    assert {scheme.label() for scheme in measured if scheme} <= checked


def test_linears_that_overrides_speak_of_are_not_planned(plan_job: PlanJob) -> None:
    overrides = [
        {"match": "*.down_proj", "skip": True},
        {"match": "*.layers.1.self_attn.?_proj", "scheme": "int8"},
        {"match": "*.layers.0.self_attn.o_proj", "method": "hqq"},
    ]
    path = plan_job(sections={"quantization": {"overrides": overrides}})
    (plan,) = made(check_to_plan(path))
    names = plan.labels().keys()
    assert len(names) == 7 * BLOCKS - BLOCKS - 4
    assert "model.layers.0.self_attn.o_proj" in names
    assert check(path).planned is not None


def test_schemes_that_the_artifact_cannot_hold_are_no_candidates(plan_job: PlanJob) -> None:
    job = check_to_plan(plan_job(candidates=["int4"]))
    assert {scheme.symmetric for family in job.families for scheme in family.schemes} == {True}
    assert all(note.startswith("left out: int4 ") for note in job.notes[:2])
    native = plan_job("n", {"output": {"store": "./s", "format": "native"}}, candidates=["int4"])
    schemes = {scheme for family in check_to_plan(native).families for scheme in family.schemes}
    assert schemes == set(CLASSES["int4"])


def test_whole_models_are_checked_by_a_held_out_text(plan_job: PlanJob, text_file: Path) -> None:
    named = {"candidates": ["default", "int4"], "held_out": str(text_file)}
    job = check_to_plan(plan_job(**named))
    (free,) = made(job)
    checks = {check.plan: check for check in free.checks}
    assert checks["chosen"].measured > 0
    by_label = {uniform.label: uniform.totals for uniform in free.choice.uniforms}
    int8 = by_label["int8_dynamic sym channel plain"]
    assert int8.error == pytest.approx(checks["int8_dynamic sym channel"].measured)

    limit = (int8.error + checks["chosen"].measured) / 2
    other = check_to_plan(plan_job("other", **named, budgets={"error": limit}))
    asked = Asked()
    (kept,) = made(other, asked)
    assert not asked.sensed() and not asked.races()
    assert {check.plan: check for check in kept.checks}["chosen"].measured <= limit
    assert kept.choice.totals.time_us < int8.time_us
    again = list(measured_plans(other, refuse_to_start, Observer(), EFFORT))
    assert again == [kept]


def test_times_too_wide_to_tell_candidates_apart_are_warned_of() -> None:
    def plan(noise: float) -> Plan:
        options = tuple(
            option(label, us, 1, error, noise)
            for label, us, error in (("dense", 10, 0), (INT8, 9, 1), ("float8 channel plain", 8, 2))
        )
        return chosen_from([Layer(name="a", linears=("a",), options=options)], "time", Budgets())

    assert plan_left.noise(plan(0.05), Effort()) is None
    warning = plan_left.noise(plan(2.0), Effort())
    assert warning is not None
    assert "2 of 2 other candidates tie" in warning
    assert warning.endswith("plan on a quiet machine")


@pytest.mark.parametrize(
    ("sections", "plan", "message"),
    [
        ({"calibration": None}, {"rounding": "rtn"}, "calibration: a plan's errors are measured"),
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
    plan_job: PlanJob, sections: dict[str, Any], plan: dict[str, Any], message: str
) -> None:
    with pytest.raises((JobFaults, QuantfleetError)) as caught:
        check_to_plan(plan_job("bad", sections, **plan))
    said = caught.value.lines() if isinstance(caught.value, JobFaults) else [str(caught.value)]
    assert len(said) == 1
    assert message in said[0]
    assert caught.value.exit_code in (2, 3)


def test_a_job_without_a_plan_says_how_to_have_one(
    plan_job: PlanJob, job_file: JobFile, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = plan_job()
    message = refused(2, "run", path, "--in-process")
    assert "quantization.plan.path: there is no plan in " in message
    assert "run quantfleet plan with this job first" in message
    assert "no plan in" in refused(2, "plan", path, "--budget", "error=1")
    assert "method: gptq needs no plan" in refused(2, "plan", job_file("g"), "--in-process")
    assert "--least: write" in refused(2, "plan", path, "--least", "error")
    (tmp_path / "notes.json").write_text("{}")
    output = str(tmp_path / "notes.json")
    assert "is no plan" in refused(3, "plan", path, "--in-process", "--output", output)


def test_a_plan_for_what_the_job_asks_no_more_is_refused(plan_job: PlanJob, tmp_path: Path) -> None:
    made(check_to_plan(plan_job()))
    for changed, why in (
        ({"budgets": {"error": 0.5}}, "was made for other budgets"),
        ({"least": "error"}, "has the least time, not the least error"),
        ({"profile": "mix"}, "was made for another profile"),
        ({"held_out": "a.txt"}, "was made without a held-out text"),
        ({"candidates": ["int4"]}, "has other candidates, as int8 sym channel"),
    ):
        with pytest.raises(JobFaults, match=f"the plan in the job's folder {why}: run quantfleet"):
            check(plan_job(**changed))
    output = str(tmp_path / "other.json")
    outcome = quantfleet("plan", plan_job(), "--budget", "error=0.001", "--output", output)
    assert outcome.code == 0, outcome
    assert parse(Path(output).read_text()).choice.totals.error <= 0.001


def test_bytes_are_known_without_a_device() -> None:
    bench = Bench("cpu")
    for shape in ((192, 128), (96, 64)):
        for dtype in ("float32", "bfloat16"):
            for candidate in candidates_of(schemes_of(["all"])):
                if refused(candidate, shape, dtype, "cpu") is None:
                    found = weight_bytes(candidate, *shape, dtype)
                    assert found == bench.num_bytes(candidate, *shape, dtype), candidate.label()


def test_the_job_file_names_what_there_is() -> None:
    assert get_args(CandidateClass) == tuple(CLASSES)
    assert get_args(NamedProfile) == (*PROFILES, "recorded")
    assert PlanSpec.model_validate({"budgets": {"bytes": "1.5 KiB"}}).budgets.num_bytes() == 1536


def test_a_recorded_profile_is_what_the_calibration_hands_a_linear(plan_job: PlanJob) -> None:
    job = check_to_plan(plan_job(profile="recorded"))
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


def test_errors_are_merged_in_any_order_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = open_errors(str(tmp_path), "key")
    keep(store, {"a": {INT8_LINEAR: 0.5}})
    keep(store, {"a": {INT8_LINEAR: 0.75, DYNAMIC: 0.25}, "b": {INT8_LINEAR: 1.0}})
    labels = {of.label(): of for of in (INT8_LINEAR, DYNAMIC)}
    assert known(store, labels) == {
        "a": {INT8_LINEAR: 0.5, DYNAMIC: 0.25},
        "b": {INT8_LINEAR: 1.0},
    }
    files = store.list()
    assert len(files) == 2
    tidy(store)
    (kept,) = store.list()
    assert kept not in files
    assert known(store, labels)["a"] == {INT8_LINEAR: 0.5, DYNAMIC: 0.25}
    store.put("0.json", b'{"version": 1, "errors": {"a": {"int8 sym channel": "0"}}}')
    with pytest.raises(QuantfleetError, match=r"0.json: damaged"):
        known(store, labels)
