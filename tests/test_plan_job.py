"""`method: plan`: jobs that take each linear's scheme from a plan document, in one process."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.load import read_document, resolve_paths, validate
from orchestrator.checks import Prepared, check
from orchestrator.fetch import fetch
from orchestrator.ray_jobs import _packed
from orchestrator.stored import job_status
from quantcore.autoquant import relay
from quantcore.autoquant.document import Plan, written
from quantcore.autoquant.measurements import HardwareKind
from quantcore.errors import JobFaults, SpecError
from tests.command import quantfleet
from tests.conftest import BLOCKS, HIDDEN, INNER
from tests.plans import H200, INT4, INT8, here, labels_of, plan_of
from tests.test_orchestrator_job import JobFile, _Dies, model_bytes, run_here
from workers.loading import load
from workers.machine import Machine, look
from workers.store import open_store

OVERRIDES = [
    {"match": "*.mlp.gate_proj", "scheme": "int8"},
    {"match": "*.mlp.up_proj", "scheme": "int8"},
    {"match": "*.mlp.down_proj", "skip": True},
]

PlanJob = Callable[..., Path]


@pytest.fixture
def plan_job(job_file: JobFile, tmp_path: Path) -> PlanJob:
    """A job over a plan: `plan_job(labels or a plan)`; other keywords change its quantization."""

    def write(of: Mapping[str, str] | Plan, name: str = "planned", **keys: Any) -> Path:
        made = of if isinstance(of, Plan) else plan_of(of)
        (tmp_path / f"{name}.json").write_text(written(made))
        named = {"path": f"{name}.json", **keys.pop("plan", {})}
        sections = {
            key: keys.pop(key) for key in ("calibration", "output", "workers") if key in keys
        }
        return job_file(name, quantization={"method": "plan", "plan": named, **keys}, **sections)

    return write


def fault_of(job: Path) -> tuple[str, str, int]:
    """The only fault's field and message, and the exit code."""
    with pytest.raises(JobFaults) as caught:
        check(job)
    (fault,) = caught.value.faults
    return fault.field, fault.message, caught.value.exit_code


@pytest.mark.parametrize("rounding", ["gptq", "rtn", "hqq"])
def test_a_plan_gives_the_bytes_of_the_same_overrides_written_by_hand(
    plan_job: PlanJob, job_file: JobFile, rounding: str
) -> None:
    by_hand = {"scheme": "int4", "group_size": 32, "method": rounding, "overrides": OVERRIDES}
    hand = run_here(job_file("hand", quantization=by_hand))
    planned = run_here(plan_job(labels_of(BLOCKS), plan={"rounding": rounding}))
    assert model_bytes(planned.store) == model_bytes(hand.store)
    assert planned.report["layers"] == hand.report["layers"]
    labels = {line["scheme"] for line in planned.report["layers"]}
    assert labels == {"int4 sym g32", "int8 sym channel"}


def test_an_artifact_is_laid_as_its_plan_says_once_it_is_loaded(
    plan_job: PlanJob, tmp_path: Path
) -> None:
    plan = plan_of(labels_of(BLOCKS, attention="int4 sym g32 int4_cpu"))
    fetch(open_store(run_here(plan_job(plan)).store), tmp_path / "out")
    model = load(tmp_path / "out", torch.bfloat16, inductor_settings=False)
    q_proj = model.model.layers[0].self_attn.q_proj
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert q_proj.weight.layout_name == "plain"
        relay(model, plan, other_hardware=True)
        assert q_proj.weight.layout_name == "int4_cpu"
        torch.testing.assert_close(model(ids).logits, plain, rtol=0.05, atol=0.05)


def test_overrides_come_after_the_plan(plan_job: PlanJob, job_file: JobFile) -> None:
    """The last one that matches decides: a scheme, a method for what the plan says, or skip."""
    more = [
        {"match": "*.o_proj", "method": "rtn"},
        {"match": "*.layers.0.mlp.down_proj", "scheme": "int8"},
        {"match": "*.layers.1.*", "skip": True},
    ]
    by_hand = {"scheme": "int4", "group_size": 32, "overrides": [*OVERRIDES, *more]}
    hand = run_here(job_file("hand", quantization=by_hand))
    planned = run_here(plan_job(labels_of(BLOCKS), overrides=more))
    assert model_bytes(planned.store) == model_bytes(hand.store)


def test_a_planned_output_head_is_rounded_where_an_override_says_how(
    plan_job: PlanJob, job_file: JobFile
) -> None:
    labels = {**labels_of(BLOCKS), "lm_head": INT8}
    rtn = {"match": "lm_head", "method": "rtn"}
    by_hand = [*OVERRIDES, {**rtn, "scheme": "int8"}]
    hand = job_file("hand", quantization={"scheme": "int4", "group_size": 32, "overrides": by_hand})
    planned = plan_job(labels, overrides=[rtn])
    assert model_bytes(run_here(planned).store) == model_bytes(run_here(hand).store)
    field, message, _ = fault_of(plan_job(labels, "gptq"))
    assert (field, message.endswith("for it, in an override of 'lm_head'")) == (
        "quantization.plan.path",
        True,
    )
    dense = check(plan_job({**labels, "lm_head": "dense"}, "dense"))
    assert dense.plan.head is None


def test_the_plan_stands_in_the_artifact_and_a_job_is_taken_up_with_it(
    plan_job: PlanJob, tmp_path: Path
) -> None:
    whole = run_here(plan_job(labels_of(BLOCKS), "whole")).store
    (name,) = (path.name for path in (Path(whole) / "plan").iterdir())
    assert f"plan/{name}" in json.loads((Path(whole) / "manifest.json").read_text())["files"]
    assert (Path(whole) / "plan" / name).read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert job_status(open_store(whole))["scheme"] == "by plan"

    job = plan_job(labels_of(BLOCKS), "broken")
    with pytest.raises(KeyboardInterrupt):
        run_here(job, observer=_Dies("publish/0"))
    (tmp_path / "broken.json").unlink()
    broken = Path(whole).parent / "broken"
    assert quantfleet("resume", broken, "--in-process").code == 0
    assert model_bytes(str(broken)) == model_bytes(whole)


def test_another_plan_is_another_job_and_new_times_are_not(
    plan_job: PlanJob, tmp_path: Path
) -> None:
    job = plan_job(labels_of(BLOCKS))
    run_here(job)
    timed_anew = plan_of(labels_of(BLOCKS))
    timed_anew = replace(timed_anew, profile=replace(timed_anew.profile, name="mine"))
    (tmp_path / "planned.json").write_text(written(timed_anew))
    assert run_here(job).already_finished
    plan_job(labels_of(BLOCKS, mlp=INT4))
    with pytest.raises(SpecError, match=r"quantization.plan.schemes: this job was begun"):
        run_here(job)


def test_a_plan_of_other_hardware_is_refused_unless_the_job_says_so(plan_job: PlanJob) -> None:
    other = plan_of(labels_of(BLOCKS), H200)
    field, message, code = fault_of(plan_job(other))
    assert (field, code) == ("quantization.plan.path", 4)
    assert message.startswith("plan: made for NVIDIA H200, driver 570.1")
    assert message.endswith("or allow a plan of other hardware, by plan.other_hardware: true")
    allowed = check(plan_job(other, plan={"other_hardware": True}))
    assert allowed.notes[0].startswith("schemes by a plan for NVIDIA H200, ")
    assert allowed.notes[0].endswith(", which no worker is")
    older = plan_of(labels_of(BLOCKS), replace(here(), torch="2.9.0"))
    assert "torch 2.9.0" in fault_of(plan_job(older))[1]
    assert check(plan_job(plan_of(labels_of(BLOCKS), here(threads=8)))).planned is not None


GONE = labels_of(BLOCKS)
GONE.pop("model.layers.1.mlp.down_proj")
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("plan", "keys", "message"),
    [
        (
            {**labels_of(BLOCKS), "model.layers.3.mlp.down_proj": INT8},
            {},
            "the plan names 'model.layers.3.mlp.down_proj', which the model has not: name a plan",
        ),
        (
            labels_of(BLOCKS + 1),
            {},
            r"'model.layers.3.mlp.down_proj', which the .* \(and 6 more like this\)$",
        ),
        (GONE, {}, "nothing of 'model.layers.1.mlp.down_proj': plan anew, or name it in an "),
        (
            plan_of(labels_of(BLOCKS), shapes={Q: (HIDDEN, INNER)}),
            {},
            f"'{Q}' has 64 outputs and 128 inputs in the plan and 64 outputs and 64 inputs in the ",
        ),
        (
            {**labels_of(BLOCKS), Q: INT8},
            {},
            r"^splits q_proj/k_proj/v_proj of 'model.layers.0.self_attn', .*: plan anew, with one",
        ),
        (
            labels_of(BLOCKS, mlp="int4 float-zero g32 plain"),
            {},
            r"^compressed-tensors has whole .* \(first: 'model.layers.0.mlp.gate_proj'\)$",
        ),
        (
            labels_of(BLOCKS, mlp="int8 asym channel plain"),
            {},
            r"asymmetric scheme beside another .* \(first: 'model.layers.0.mlp.gate_proj'\)$",
        ),
        (
            labels_of(BLOCKS, "dense", "dense"),
            {},
            "the plan leaves every linear dense: there is nothing",
        ),
        (
            labels_of(BLOCKS, mlp="int8_static sym channel plain"),
            {"calibration": None, "plan": {"rounding": "rtn"}},
            "'model.layers.0.mlp.gate_proj': int8_static finds its activation scales in texts",
        ),
        (
            labels_of(BLOCKS, attention="int4 sym g128 plain"),
            {},
            "groups of 128 do not divide the 64 inputs of 'model.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_a_plan_that_is_not_of_this_model_or_format_is_one_clear_error(
    plan_job: PlanJob, plan: Mapping[str, str] | Plan, keys: dict[str, Any], message: str
) -> None:
    field, said, code = fault_of(plan_job(plan, **keys))
    assert (field, code) == ("quantization.plan.path", 2)
    assert re.search(message, said), said


def test_what_a_method_cannot_do_names_the_layer_and_who_says_so(plan_job: PlanJob) -> None:
    labels = labels_of(BLOCKS, mlp="float8 channel plain")
    field, message, _ = fault_of(plan_job(labels, plan={"rounding": "hqq"}))
    assert field == "quantization.plan.rounding"
    assert message.startswith("'model.layers.0.mlp.gate_proj', as the plan has it: hqq fits grids")
    smoothed = [{"match": "*.self_attn.?_proj", "method": "smoothquant"}]
    field, message, _ = fault_of(plan_job(labels, overrides=smoothed))
    assert field == "quantization.overrides.0"
    assert message.startswith(
        "'model.layers.0.self_attn.q_proj', as the plan has it: method smooth"
    )


def test_what_no_plan_says_may_be_said_by_an_override(plan_job: PlanJob) -> None:
    skip = [{"match": "*.layers.1.mlp.down_proj", "skip": True}]
    assert check(plan_job(GONE, overrides=skip)).planned is not None


def test_a_plan_that_cannot_be_read_is_one_clear_error(plan_job: PlanJob, tmp_path: Path) -> None:
    job = plan_job(labels_of(BLOCKS))
    (tmp_path / "planned.json").write_text("{}")
    field, message, code = fault_of(job)
    assert (field, code) == ("quantization.plan.path", 2)
    assert message == f"{tmp_path / 'planned.json'}: plan: damaged (no 'version'): plan anew"
    (tmp_path / "planned.json").unlink()
    field, message, code = fault_of(job)
    assert (field, code) == ("quantization.plan.path", 3)
    assert "cannot access 'planned.json': No such file" in message


def test_a_plan_travels_with_a_job_that_is_submitted(plan_job: PlanJob, tmp_path: Path) -> None:
    spec, _ = validate(read_document(plan_job(labels_of(BLOCKS))))
    assert spec is not None
    with _packed(resolve_paths(spec, tmp_path)) as folder:
        sent = check(folder / "job.yaml")
        assert sent.planned is not None
        assert sent.planned.document == (tmp_path / "planned.json").read_bytes()


def test_in_a_mixed_fleet_a_plan_is_of_one_of_the_kinds(plan_job: PlanJob) -> None:
    def look_at(paths: Sequence[str]) -> list[Machine]:
        cpu = look(paths)
        other = {**cpu.kinds["cpu"], "name": "Other CPU"}
        return [cpu, replace(cpu, name="other", kinds={"cpu": other})]

    def described(hardware: HardwareKind) -> Prepared:
        job = plan_job(plan_of(labels_of(BLOCKS), hardware), workers={"kind": "mixed"})
        return check(job, look_at=look_at, touch_store=False)

    for name in (here().name, "Other CPU"):
        assert not described(replace(here(), name=name)).notes[0].endswith("which no worker is")
    with pytest.raises(JobFaults, match="made for Third CPU"):
        described(replace(here(), name="Third CPU"))


def test_a_plan_is_read_from_a_store(plan_job: PlanJob, bucket: str, tmp_path: Path) -> None:
    job = plan_job(labels_of(BLOCKS))
    document = (tmp_path / "planned.json").read_bytes()
    open_store(f"{bucket}/artifacts/a").put("plan/NVIDIA_H200.json", document)
    place = f"{bucket}/artifacts/a/plan/NVIDIA_H200.json"
    job.write_text(job.read_text().replace("planned.json", place))
    prepared = check(job)
    assert prepared.planned is not None
    assert prepared.planned.document == document
