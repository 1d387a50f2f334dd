"""quantfleet plan, end to end: which whole models run on a worker, what is kept of it and told."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.plan import PlanSpec
from orchestrator import plan_left, plan_proving
from orchestrator.checks import check
from orchestrator.loop import Observer, Summaries
from orchestrator.plan_measuring import measured_plans
from orchestrator.plan_proving import Prover
from orchestrator.plan_room import Stand
from orchestrator.to_plan import check_to_plan
from quantcore.autoquant import finalists
from quantcore.autoquant.document import End, Plan
from quantcore.autoquant.finalists import Finalist
from quantcore.autoquant.measurements import Timing
from quantcore.errors import JobFaults, QuantfleetError, ResourceError
from quantcore.joining import Joined
from quantcore.tensors import QuantizedTensor
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.planning import (
    EFFORT,
    REST_US,
    Asked,
    Fleet,
    Lossy,
    made,
    mixed,
    refuse_to_start,
)
from tests.test_orchestrator_job import JobFile, run_here
from workers import decoding, proven, proving
from workers.machine import Machine, look
from workers.store import open_store
from workers.tasks import Prove, Task

PlanJob = Callable[..., Path]

ALONE = {"dense": 8.0, "int8": 2.2, "int8_dynamic": 2.0}
INT8, DYNAMIC = "int8 sym channel plain", "int8_dynamic sym channel plain"
LINEARS = 7 * BLOCKS


def fleet(whole: Mapping[str, float] | None) -> type[Fleet]:
    """Times of linears alone speak for int8_dynamic, by a tenth."""
    return type("Made", (Fleet,), {"alone": ALONE, "whole": whole})


def planned(path: Path, whole: Mapping[str, float] | None, asked: Observer | None = None) -> Plan:
    job = check_to_plan(path)
    (plan,) = measured_plans(job, fleet(whole), asked or Observer(), EFFORT, EFFORT)
    plan_left.leave(job, plan, str(path.with_suffix(".json")))
    return plan


def by_plan(plan: Plan) -> dict[str, End]:
    return {end.plan: end for end in plan.ends}


def test_the_plan_that_was_predicted_is_kept_where_it_is_the_fastest(job_to_plan: PlanJob) -> None:
    asked = Asked()
    plan = planned(job_to_plan(), ALONE, asked)
    assert set(plan.labels().values()) == {DYNAMIC}
    (task,) = asked.proven()
    assert [set(labels.values()) for labels in task.plans] == [{DYNAMIC}, {"dense"}, {INT8}]
    assert task.calls == {1: 8, 16: 1}
    ends = by_plan(plan)
    assert [end.plan for end in plan.ends if end.kept] == ["chosen by prediction"]
    assert ends["dense"].measured_us == pytest.approx(REST_US + 8 * LINEARS)
    assert ends["dense"].predicted_us == ends["dense"].measured_us
    told = plan_left.facts(plan, "plan.json", "store")["times"]
    assert told.startswith("the whole model was run end to end: 1042 us, predicted as ")


def test_a_uniform_plan_that_is_faster_when_it_runs_is_kept_and_followed(
    job_to_plan: PlanJob,
) -> None:
    path = job_to_plan(rounding="rtn")
    plan = planned(path, {"dense": 80.0, "int8": 20.0, "int8_dynamic": 30.0})
    assert set(plan.labels().values()) == {INT8}
    kept = by_plan(plan)[INT8]
    assert kept.kept and kept.measured_us == pytest.approx(REST_US + 20 * LINEARS)
    prepared = check(path)
    assert {of.scheme.name for of in prepared.plan.layers() if of.scheme} == {"int8"}
    text = quantfleet("plan", "show", path.with_suffix(".json")).out
    assert f"{INT8}: 1420 us end to end (1420 to 1420), predicted " in text


def test_what_kernels_took_in_the_model_scales_their_times(job_to_plan: PlanJob) -> None:
    """Races have 10 us for each row and token on a CPU: so has the model, but for one kernel."""
    path = job_to_plan()
    predicted = planned(path, ALONE).choice.uniforms
    linears_us = {of.label: of.totals.time_us / LINEARS for of in predicted}
    whole = {
        "dense": linears_us["dense"],
        "int8": linears_us[INT8],
        "int8_dynamic": 1.5 * linears_us[DYNAMIC],
    }
    plan = planned(job_to_plan("other", {"output": {"store": "./other"}}), whole)
    assert set(plan.labels().values()) == {INT8}
    assert plan.factors == {
        "int8 plain": pytest.approx(1),
        "int8_dynamic plain": pytest.approx(1.5),
    }
    totals = {of.label: of.totals.time_us for of in plan.choice.uniforms}
    assert totals[DYNAMIC] == pytest.approx(1.5 * linears_us[DYNAMIC] * LINEARS)
    out = path.with_name("other.json")
    text = quantfleet("plan", "explain", plan.choice.layers[0].layer, "--plan", out).out
    assert "times of int8_dynamic plain are 1.5 of what was timed, as whole models ran" in text


def test_what_ran_is_known_and_runs_no_more(job_to_plan: PlanJob) -> None:
    first = planned(job_to_plan("a"), ALONE)
    job = check_to_plan(job_to_plan("b"))
    again = measured_plans(job, refuse_to_start, Observer(), EFFORT, EFFORT)
    assert list(again) == [first]
    asked = Asked()
    tight = planned(job_to_plan("c", budgets={"error": 0.001}), ALONE, asked)
    assert asked.tasks == asked.proven() != [], "other plans, and nothing else, are run"
    assert tight.ends
    other = Asked()
    planned(job_to_plan("d", calls=[{"tokens": 1, "times": 4}]), ALONE, other)
    assert other.proven(), "other calls"


def test_what_ran_before_an_interruption_is_kept_and_a_lost_worker_costs_its_run_alone(
    job_to_plan: PlanJob,
) -> None:
    before, after, lossy = Asked("prove"), Asked(), Asked()
    with pytest.raises(KeyboardInterrupt):
        made(check_to_plan(job_to_plan()), before)
    made(check_to_plan(job_to_plan()), after)
    assert len(before.proven()) == 1
    assert before.proven()[0] not in after.proven()
    elsewhere = job_to_plan("lost", {"output": {"store": "./elsewhere"}})
    (plan,) = measured_plans(check_to_plan(elsewhere), Lossy, lossy, EFFORT)
    assert lossy.proven()[0] == lossy.proven()[1]
    assert [end.plan for end in plan.ends if end.kept]


def test_runs_that_are_damaged_or_older_are_named_and_made_anew(job_to_plan: PlanJob) -> None:
    job = check_to_plan(job_to_plan())
    first = planned(job_to_plan(), ALONE)
    store = proven.open_ends(job.spec.output.store, job.model_key)
    (name,) = store.list()
    run = json.loads(store.get(name))
    lines: list[str] = []
    for text, why in (
        ("{", "damaged"),
        (json.dumps({**run, "version": 0}), "version 0 where this reads 1"),
        (json.dumps({"version": 1, "runs": {"a": {"hardware": "x", "plans": {"b": {}}}}}), "damag"),
    ):
        store.delete(name)
        name = f"{why.split()[0]}.json"
        store.put(name, text.encode())
        assert proven.known(store, lines.append) == {}
        assert why in lines[-1] and name in lines[-1]
    assert planned(job_to_plan(), ALONE) == first
    assert len(store.list()) == 2, "what cannot be read is left where it is"


def test_the_better_known_of_two_runs_is_taken_in_any_order(tmp_path: Path) -> None:
    def run(us: float, spread: float) -> proven.Run:
        timing = Timing(median_us=us, low_us=us - spread, high_us=us + spread, repeats=8)
        return proven.Run("a CPU", {"plan": timing})

    wide, narrow = run(8.0, 1.0), run(9.0, 0.5)
    for number, runs in enumerate([(wide, narrow), (narrow, wide)]):
        store = open_store(str(tmp_path / str(number)))
        for of in runs:
            proven.keep(store, "digest", of)
        assert proven.known(store, pytest.fail) == {"digest": narrow}
        proven.tidy(store)
        assert len(store.list()) == 1
        assert proven.known(store, pytest.fail) == {"digest": narrow}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"end_to_end": "maybe"}, "quantization.plan.end_to_end"),
        ({"end_to_end": True, "least": "error"}, "told apart by time: write least: time, or drop"),
        ({"path": "a.json", "end_to_end": False}, "made already: drop end_to_end, or drop path"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(
    job_to_plan: PlanJob, plan: dict[str, Any], message: str
) -> None:
    with pytest.raises((JobFaults, QuantfleetError)) as caught:
        check_to_plan(job_to_plan("bad", **plan))
    said = caught.value.lines() if isinstance(caught.value, JobFaults) else [str(caught.value)]
    assert message in " ".join(said)
    assert caught.value.exit_code == 2


def test_whole_models_that_took_turns_with_something_else_are_warned_of(
    job_to_plan: PlanJob,
) -> None:
    plan = planned(job_to_plan(), ALONE)
    assert plan_left.facts(plan, "plan.json", "store")["noise_end_to_end"] is None
    wide = [replace(end, high_us=1.2 * end.measured_us) for end in plan.ends]
    told = plan_left.facts(replace(plan, ends=tuple(wide)), "plan.json", "store")
    assert told["noise_end_to_end"] == (
        "times of whole models are uncertain: chosen by prediction is known to 20% of its time: "
        "run them again where nothing else runs, once STORE/measurements/ends is deleted"
    )


def test_what_does_not_run_is_told(job_to_plan: PlanJob) -> None:
    assert PlanSpec().end_to_end == "auto"
    off = check_to_plan(job_to_plan("off", end_to_end=False))
    assert not [note for note in off.notes if "end to end" in note], "it was asked for"
    (plan,) = made(off)
    assert plan.ends == ()
    told = plan_left.facts(plan, "plan.json", "store")["times"]
    assert told == "times are the linears' own, added up: nothing of this plan was run end to end"
    (note,) = [
        note for note in check_to_plan(job_to_plan("e", least="error")).notes if "runs end" in note
    ]
    assert (
        note == "nothing runs end to end: plans that run are told apart by time, and not by error"
    )


def test_a_worker_without_room_for_a_whole_model_runs_none_or_is_refused(
    job_to_plan: PlanJob,
) -> None:
    usual = check_to_plan(job_to_plan()).kinds[0].prepared.admitted.room
    here = look([]).memory_free

    def small(paths: Sequence[str]) -> list[Machine]:
        return [replace(look(paths), memory_free=here - usual + (1180 << 20))]

    job = check_to_plan(job_to_plan(), look_at=small)
    (note,) = [note for note in job.notes if "end to end" in note]
    assert note.startswith("nothing runs end to end on ") and note.endswith("are predictions")
    (plan,) = made(job)
    assert plan.ends == ()
    with pytest.raises(ResourceError, match=r"^quantization.plan.end_to_end: a worker .*: write f"):
        check_to_plan(job_to_plan("b", end_to_end=True), look_at=small)


def test_room_is_looked_for_on_each_kind_of_a_fleet(job_to_plan: PlanJob) -> None:
    def small_gpu(paths: Sequence[str]) -> list[Machine]:
        return [replace(machine, device_free={"cuda": (3 << 30,)}) for machine in mixed(paths)]

    sections = {"workers": {"kind": "mixed"}, "compute_dtype": "bfloat16"}
    job = check_to_plan(
        job_to_plan(sections=sections, calls=[{"tokens": 100_000}]), look_at=small_gpu
    )
    (note,) = [note for note in job.notes if "end to end" in note]
    assert note.startswith(
        "nothing runs end to end on NVIDIA H200: a whole model and its linears under two plans take"
    )
    gpu, cpu = job.kinds
    assert isinstance(gpu.stand, str) and isinstance(cpu.stand, Stand)
    assert (cpu.stand.cache_tokens, cpu.stand.longest) == (256, 256)


def test_uniform_plans_that_there_is_no_room_for_are_left_out_and_named(
    job_to_plan: PlanJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = check_to_plan(job_to_plan())
    done: list[Prove] = []
    told: list[str] = []

    def do(tasks: Mapping[str, Task], *listening: Observer) -> Summaries:
        ((name, task),) = tasks.items()
        assert isinstance(task, Prove)
        done.append(task)
        ends = [Timing(median_us=9.0, low_us=8.0, high_us=9.5, repeats=8) for _ in task.plans]
        for observer in listening:
            observer.finished(Any, plan_proving.Result(name, 0, 0.0, {"ends": ends}))  # type: ignore[arg-type]
        return {}

    def prover(room: float) -> Prover:
        return Prover(
            job=job,
            hardware=job.kinds[0].hardware,
            stand=Stand(cache_tokens=8, longest=32, room=room),
            layers={"a": ("a",)},
            effort=EFFORT,
            do=do,
            ignored=pytest.fail,
            left_out=told.append,
        )

    four = [
        Finalist(plan=name, labels={"a": name}, time_us=1, error=0, num_bytes=100 << 20)
        for name in ("chosen", "dense", INT8, DYNAMIC)
    ]
    found = prover(350 << 20).timed(four)
    assert [timing is None for timing in found] == [False, False, False, True]
    assert told == [
        f"not run end to end: {DYNAMIC}: beside the others a worker has no room for 100.0MiB more"
    ]
    assert len(prover(0).timed(four[:2])) == 2, "these two are checked beforehand"
    whole = prover(400 << 20).timed(four)
    assert None not in whole and len(done) == 3
    assert prover(0).timed(four) == whole, "what is known needs no room"
    assert len(done) == 3


def test_a_worker_runs_the_whole_model_as_each_plan_leaves_it(
    job_to_plan: PlanJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stopwatch that is made up: int8 is the faster one in the model."""
    us = {"dense": 8.0, "int8": 1.0, "int8_dynamic": 2.0}
    elapsed_us = [0.0]
    dressed: list[tuple[int, ...]] = []

    def call(model: nn.Module, tokens: int, cache_tokens: int, longest: int) -> Callable[[], None]:
        real = decoding.call(model, tokens, cache_tokens, longest)
        modules = [m for m in model.model.modules() if isinstance(m, nn.Linear | Joined)]  # type: ignore[union-attr]
        weights = [module.weight for module in modules]
        names = [w.scheme.name if isinstance(w, QuantizedTensor) else "dense" for w in weights]
        joined = sum(isinstance(module, Joined) for module in modules)
        dressed.append((tokens, cache_tokens, len(modules), joined))
        real()

        def run() -> None:
            elapsed_us[0] += 50.0 + tokens * sum(us[name] for name in names)

        return run

    def stopwatch(run: Callable[[], object]) -> float:
        elapsed_us[0] = 0.0
        run()
        return elapsed_us[0]

    monkeypatch.setattr(proving, "call", call)
    monkeypatch.setattr(finalists, "_microseconds", stopwatch)
    plan = planned(job_to_plan(calls=[{"tokens": 2}, {"tokens": 24}]), None)
    linears = (4 * BLOCKS, 2 * BLOCKS)  # of them joined
    assert set(dressed) == {(2, 256, *linears), (24, 256, *linears)}
    assert set(plan.labels().values()) == {INT8}
    ends = by_plan(plan)
    for label, name in (("dense", "dense"), (INT8, "int8")):
        whole = 2 * 50.0 + (2 + 24) * 4 * BLOCKS * us[name]
        assert ends[label].measured_us == pytest.approx(whole)


def test_static_schemes_run_with_scales_from_texts_or_kept_statistics(
    job_to_plan: PlanJob, job_file: JobFile, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it real but the races; joined linears have one scale."""
    calibration = {"text": str(text_file), "sequences": 8, "length": 32, "keep_statistics": True}
    kept = run_here(job_file("kept", calibration=calibration)).store
    monkeypatch.setattr(f"{__name__}.ALONE", {"int8_static": 2.0})
    for name, texts in (("text", {}), ("kept", {"calibration": {"statistics": kept}})):
        asked, output = Asked(), {"store": f"./{name}", "format": "native"}
        job = job_to_plan(name, {"output": output, **texts}, candidates=["all"])
        plan = planned(job, None, asked)
        chosen, *_ = asked.proven()[0].plans
        assert {label.split()[0] for label in chosen.values()} == {"int8_static"}
        assert all(end.measured_us > 0 for end in plan.ends)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
@torch.no_grad()
def test_every_family_steps_out_of_a_cache_and_reads_prompts(
    family: str, model_folder: Callable[..., Path]
) -> None:
    from workers.loading import load

    model = load(model_folder(family), torch.float32, inductor_settings=False)
    step = decoding.call(model, 3, cache_tokens=12)
    for _ in range(20):  # the cache is begun anew
        step()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape)) if args else None
    )
    assert decoding.call(model, 34, 12, longest=20)() is not None
    assert shapes == [(2, 17)]


def test_a_prompt_that_is_too_long_comes_as_few_of_one_length() -> None:
    assert [decoding.sequences(tokens, 2048) for tokens in (17, 2048, 4096, 6000)] == [1, 1, 2, 3]
    assert decoding.sequences(4099, 2048) == 4099, "a prime"
