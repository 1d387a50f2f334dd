"""quantfleet plan: measured on workers, kept, chosen for each kind of hardware, and followed."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrator import plan_left
from orchestrator.checks import check
from orchestrator.loop import Observer
from orchestrator.plan_checking import Checker
from orchestrator.plan_measuring import _Fleet, measured_plans
from orchestrator.to_plan import check_to_plan
from quantcore.activations import fake_quantize
from quantcore.autoquant.document import file_name, parse
from quantcore.autoquant.spots import Spot
from quantcore.schemes import Scheme
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.planning import (
    DYNAMIC,
    EFFORT,
    INT8_LINEAR,
    Asked,
    Fleet,
    Lossy,
    made,
    mixed,
    refuse_to_start,
    two_cpus,
)
from tests.plans import here
from tests.test_orchestrator_job import JobFile, _Dies, model_bytes, run_here

PlanJob = Callable[..., Path]


def test_a_job_is_planned_from_yaml_and_followed_by_run(
    job_to_plan: PlanJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, with real times of this CPU; all that it prints is one JSON value."""
    monkeypatch.chdir(tmp_path)
    budgets = {"bytes": "200 KiB"}  # of such small products the dense one is the fastest
    job = job_to_plan(rounding="rtn", calls=[{"tokens": 1}], budgets=budgets)
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
    fitting = {of["label"]: of["fits"] for of in facts["uniforms"]}
    assert not fitting["dense"]
    assert facts["errors"].endswith("no whole model was checked")
    assert facts["times"].startswith("the whole model was run end to end: ")
    assert [end.plan for end in plan.ends if end.kept and end.low_us > 0]

    report = run_here(job).report
    schemes = {line["layer"]: line["scheme"] for line in report["layers"]}
    taken = {name: label for name, label in plan.labels().items() if label != "dense"}
    assert schemes == {name: label.removesuffix(" plain") for name, label in taken.items()}
    manifest = json.loads((tmp_path / "store/job/manifest.json").read_text())
    assert f"plan/{stored.name}" in manifest["files"]
    text = quantfleet("plan", job, "--in-process")
    assert (text.code, "was begun, and follows the plan" in text.err) == (2, True)


def test_nothing_is_measured_twice(job_to_plan: PlanJob) -> None:
    (first,) = made(check_to_plan(job_to_plan("a")))
    again = list(
        measured_plans(check_to_plan(job_to_plan("b")), refuse_to_start, Observer(), EFFORT)
    )
    assert again == [first]
    other = {"budgets": {"error": 0.001}, "least": "time", "end_to_end": False}
    (budgeted,) = measured_plans(
        check_to_plan(job_to_plan("c", **other)), refuse_to_start, Observer(), EFFORT
    )
    assert budgeted.choice.totals.error <= 0.001 < first.choice.totals.error

    asked = Asked()
    made(check_to_plan(job_to_plan("d", candidates=["default", "int4"])), asked)
    (sensed, *races, _) = asked.tasks
    assert {s.name for of in sensed.wanted.values() for s in of} == {"int4", "int8_dynamic_int4"}
    for race in races:
        assert {product.candidate.scheme for product in race.known} >= {None, DYNAMIC}


@pytest.mark.parametrize("dies_at", ["sense", "race"])
def test_what_was_measured_before_an_interruption_is_kept(
    job_to_plan: PlanJob, dies_at: str
) -> None:
    job = check_to_plan(job_to_plan())
    before, after = Asked(dies_at), Asked()
    with pytest.raises(KeyboardInterrupt):
        made(job, before)
    (plan,) = made(job, after)
    assert sorted(before.sensed() + after.sensed()) == list(range(BLOCKS))
    assert len(before.races()) == (dies_at == "race")
    assert len({*before.races(), *after.races()}) == len(before.races() + after.races()) == 4
    (whole,) = made(check_to_plan(job_to_plan("whole")))
    assert whole == plan


def test_a_model_and_a_store_may_be_far_away(
    job_to_plan: PlanJob, bucket: str, upload: Callable[..., str], model_folder: Callable[..., Path]
) -> None:
    sections = {
        "model": {"path": upload(model_folder("llama"))},
        "output": {"store": f"{bucket}/artifacts"},
    }
    path = job_to_plan("far", sections)
    job = check_to_plan(path)
    (plan,) = measured_plans(job, Fleet, Observer(), EFFORT)
    place = plan_left.leave(job, plan, str(path.parent / "far.json"))
    assert place.startswith(f"{bucket}/artifacts/far/plan/")
    planned = check(path).planned
    assert planned is not None
    assert planned.plan == plan
    again = measured_plans(check_to_plan(path), refuse_to_start, Observer(), EFFORT)
    assert list(again) == [plan]


def test_what_a_lost_worker_was_doing_is_done_by_another(job_to_plan: PlanJob) -> None:
    job = check_to_plan(job_to_plan())
    asked = Asked()
    (plan,) = measured_plans(job, Lossy, asked, EFFORT)
    assert asked.sensed() == [0, 1, 2] * 2
    assert len(asked.races()) == 4 + 1
    (whole,) = made(check_to_plan(job_to_plan("whole", {"output": {"store": f"{job.folder}/w"}})))
    assert whole == plan


def test_a_block_that_was_measured_is_not_measured_again(job_to_plan: PlanJob) -> None:
    job = check_to_plan(job_to_plan())
    with pytest.raises(KeyboardInterrupt):
        made(job, Asked(progress=True))
    asked = Asked()
    made(job, asked)
    assert asked.sensed() == [1, 2]


def test_errors_are_those_of_the_whole_model_in_float64(
    job_to_plan: PlanJob, model_folder: Callable[..., Path]
) -> None:
    """All tokens of such a short calibration are in the sample; two workers share the blocks."""
    from transformers import AutoModelForCausalLM

    job = check_to_plan(job_to_plan(sections={"workers": {"count": 2}}))
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


def test_kept_statistics_do_instead_of_texts(job_to_plan: PlanJob, job_file: JobFile) -> None:
    calibration = {"sequences": 8, "length": 32, "keep_statistics": True}
    text = check(job_file()).spec.calibration
    assert text is not None
    kept = run_here(job_file("kept", calibration={"text": str(text.text), **calibration})).store
    (by_text,) = made(check_to_plan(job_to_plan("text")))
    asked = Asked()
    job = check_to_plan(job_to_plan(sections={"calibration": {"statistics": kept}}))
    (by_statistics,) = made(job, asked)
    assert asked.sensed() == [0, 1, 2]
    for one, other in zip(by_text.measured[:4], by_statistics.measured[:4], strict=True):
        for mine, its in zip(one.options, other.options, strict=True):
            # of the first block, whose inputs are the same; of other tokens of it
            assert its.error == pytest.approx(mine.error, rel=0.2)


def test_static_schemes_of_whole_models_take_their_scales_from_kept_statistics(
    job_to_plan: PlanJob, job_file: JobFile, text_file: Path
) -> None:
    calibration = {"sequences": 8, "length": 32, "keep_statistics": True}
    text = check(job_file()).spec.calibration
    assert text is not None
    kept = run_here(job_file("kept", calibration={"text": str(text.text), **calibration})).store
    static = Scheme(name="int8_static")
    moved = []
    for name, sections in (("text", {}), ("kept", {"calibration": {"statistics": kept}})):
        job = check_to_plan(job_to_plan(f"{name}-plan", sections, held_out=str(text_file)))
        fleet = _Fleet(job.kinds[0], Fleet, Observer())
        every = Spot(
            name="every",
            linears=tuple(job.blocks),
            rows=1,
            columns=1,
            dtype=job.dtype,
            profile=job.profile,
            offered=(),
            errors={static: 1.0},
        )
        checker = Checker(job, fleet.workers, partial(fleet.do, "check"))
        (check_of_static,) = checker.factors([every])[1]
        moved.append(check_of_static.measured)
    assert 0 < moved[1] == pytest.approx(moved[0], rel=0.3)


def test_each_kind_of_the_fleet_has_a_plan_and_a_job_follows_its_own(job_to_plan: PlanJob) -> None:
    sections = {"workers": {"kind": "mixed"}, "compute_dtype": "bfloat16"}
    path = job_to_plan(candidates=["default", "int4"], sections=sections, rounding="rtn")
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


def test_cpus_of_one_name_with_other_instructions_are_two_kinds(
    job_to_plan: PlanJob, tmp_path: Path
) -> None:
    """Kernels of other instructions take another time: each is timed, and has its own plan.

    `workers.count` is of each, since they have their workers in turn.
    """
    sections = {"workers": {"kind": "mixed", "count": 1}}
    job = check_to_plan(job_to_plan(sections=sections, rounding="rtn"), look_at=two_cpus)
    assert [kind.prepared.workers for kind in job.kinds] == [1, 1]
    asked = Asked()
    mine, other = made(job, asked)
    assert len(asked.races()) == 2 * 4, "four shapes on each"
    assert mine.hardware == replace(other.hardware, instructions=mine.hardware.instructions)
    folder = tmp_path / "store" / "job" / "plan"
    found = {parse(path.read_text()).hardware: path.stem for path in folder.iterdir()}
    assert found[other.hardware] == file_name(other.hardware)[len("plan-") : -len(".json")]
    assert found[other.hardware].endswith("_FEWER")
    assert found.keys() == {mine.hardware, other.hardware}

    alone = job_to_plan("alone", {"workers": {"kind": "cpu", "count": 1}})
    (note,) = [of for of in check_to_plan(alone, look_at=two_cpus).notes if "mixed" in of]
    assert note == (
        f"not planned for: {other.hardware.full_name()}: workers.kind: mixed plans for every kind"
    )


def test_a_job_is_taken_up_with_the_plan_that_it_was_begun_by(
    job_to_plan: PlanJob, tmp_path: Path
) -> None:
    path = job_to_plan("broken", rounding="rtn", candidates=["int4"])
    made(check_to_plan(path))
    with pytest.raises(KeyboardInterrupt):
        run_here(path, observer=_Dies("publish/0"))
    outcome = quantfleet("resume", tmp_path / "store" / "broken", "--in-process")
    assert outcome.code == 0, outcome
    assert outcome.err.startswith(f"schemes by a plan for {here().full_name()}, ")
    whole = job_to_plan("whole", rounding="rtn", candidates=["int4"])
    made(check_to_plan(whole))
    assert model_bytes(run_here(whole).store) == model_bytes(str(tmp_path / "store" / "broken"))


def test_every_scheme_there_is_can_be_planned_and_checked(
    job_to_plan: PlanJob, text_file: Path
) -> None:
    native = {"output": {"store": "./s", "format": "native"}, "compute_dtype": "bfloat16"}
    job = check_to_plan(job_to_plan("n", native, candidates=["all"], held_out=str(text_file)))
    (plan,) = made(job)
    checked = {check.plan for check in plan.checks} - {"chosen"}
    assert {"int8_static sym channel", "float8_static tensor"} <= checked
    measured = {of.candidate.scheme for layer in plan.measured for of in layer.options}
    assert {scheme.label() for scheme in measured if scheme} <= checked


def test_whole_models_are_checked_by_a_held_out_text(job_to_plan: PlanJob, text_file: Path) -> None:
    named = {"candidates": ["default", "int4"], "held_out": str(text_file)}
    job = check_to_plan(job_to_plan(**named))
    (free,) = made(job)
    checks = {check.plan: check for check in free.checks}
    assert checks["chosen"].measured > 0
    by_label = {uniform.label: uniform.totals for uniform in free.choice.uniforms}
    int8 = by_label["int8_dynamic sym channel plain"]
    assert int8.error == pytest.approx(checks["int8_dynamic sym channel"].measured)

    limit = (int8.error + checks["chosen"].measured) / 2
    other = check_to_plan(job_to_plan("other", **named, budgets={"error": limit}))
    asked = Asked()
    (kept,) = made(other, asked)
    assert not asked.sensed() and not asked.races()
    assert {check.plan: check for check in kept.checks}["chosen"].measured <= limit
    assert kept.choice.totals.time_us < int8.time_us
    again = list(measured_plans(other, refuse_to_start, Observer(), EFFORT))
    assert again == [kept]
