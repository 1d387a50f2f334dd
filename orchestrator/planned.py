"""`method: plan`: which scheme each linear takes, from a document that is held against the model.

A document speaks of candidates, a scheme in a layout. A job takes the schemes: layouts are how a
weight lies while it serves, and stand in no artifact. No task knows of plans: the bytes are those
of overrides that say the same. The job's identity has the schemes alone, since new times make no
other artifact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.spec import JobSpec
from orchestrator.machines import Chosen
from orchestrator.plan_files import read_plan
from orchestrator.planning import PLAN, Schemes, last_match
from quantcore.autoquant.candidates import schemes_of
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import Plan, file_name, refuse_other_hardware
from quantcore.autoquant.measurements import HardwareKind
from quantcore.errors import Fault, ResourceError, SpecError
from workers.architecture import Architecture, LinearInfo
from workers.layout import PLANS
from workers.store import open_store


@dataclass(frozen=True, slots=True)
class Planned:
    """What a job was told by a plan."""

    plan: Plan
    document: bytes

    @property
    def name(self) -> str:
        """Where the document stands in the job's folder: plan/NVIDIA_H200.json."""
        return f"{PLANS}/{_short(self.plan.hardware)}.json"

    @property
    def schemes(self) -> Schemes:
        return {
            linear: layer.option.candidate.scheme
            for layer in self.plan.choice.layers
            for linear in layer.linears
        }


def artifact_name(job: str, hardware: HardwareKind) -> str:
    """Of a job with an artifact for each kind, that for this one: NAME-NVIDIA_H200."""
    return f"{job}-{_short(hardware)}"


def _short(hardware: HardwareKind) -> str:
    return file_name(hardware).removeprefix("plan-").removesuffix(".json")


def read_planned(place: str) -> Planned:
    return Planned(*read_plan(place))


def plans_in_store(spec: JobSpec) -> list[str]:
    """The places of what `quantfleet plan` left in the job's folder. Raises SpecError for none."""
    folder = f"{spec.output.store.rstrip('/')}/{spec.name}"
    names = sorted(open_store(folder).list(f"{PLANS}/"))
    if not names:
        raise SpecError(
            f"there is no plan in {folder} yet: run quantfleet plan with this job first, or write "
            "a path"
        )
    return [f"{folder}/{name}" for name in names]


def left_in_store(spec: JobSpec, fleet: Sequence[Chosen]) -> tuple[Planned, tuple[str, ...]]:
    """The plan that `quantfleet plan` left for this job, and a note of others beside it.

    Of several kinds that of the first of the fleet; else whichever is there, to be held against it.
    Raises SpecError where there is none, or where the job has asked for another one since.
    """
    plans = [read_planned(place) for place in plans_in_store(spec)]
    mine = next((p for chosen in fleet for p in plans if is_of(p.plan, chosen)), plans[0])
    if (asked := asked_otherwise(spec, mine.plan)) is not None:
        raise SpecError(
            f"the plan in the job's folder {asked}: run quantfleet plan again, or write its path"
        )
    others = [one.plan.hardware.label() for one in plans if one is not mine]
    notes = (
        f"one artifact, by one plan: that for {mine.plan.hardware.label()}; not by those for "
        f"{'; '.join(others)} (plan.each_kind: true makes one by each)",
    )
    return mine, notes if others else ()


def asked_otherwise(spec: JobSpec, plan: Plan) -> str | None:
    """In what a plan is not what the job asks for now."""
    planning, budgets = spec.quantization.planning, spec.quantization.planning.budgets
    wanted = Budgets(num_bytes=budgets.num_bytes(), error=budgets.error, time_us=budgets.time_us)
    if plan.choice.budgets != wanted:
        return "was made for other budgets"
    if plan.choice.objective != planning.least:
        return f"has the least {plan.choice.objective}, not the least {planning.least}"
    threads = plan.hardware.threads  # 0 on an accelerator
    if planning.threads is not None and threads not in (0, planning.threads):
        return f"was made for {threads} threads of a CPU, not for {planning.threads}"
    calls = {one.tokens: one.times for one in planning.calls}
    same = plan.profile.calls == calls if calls else plan.profile.name == planning.profile
    if not same:
        return "was made for another profile"
    whole = (
        ("a held-out text", plan.checks, planning.held_out is not None),
        ("plans run end to end", plan.ends, planning.end_to_end),
    )
    for what, told, asked in whole:
        if asked not in {"auto", bool(told)}:
            return f"was made {'with' if told else 'without'} {what}"
    offered = {option.candidate.scheme for layer in plan.measured for option in layer.options}
    left = offered - {None, *schemes_of(planning.candidates)}
    names = sorted(scheme.label() for scheme in left if scheme)
    return f"has other candidates, as {names[0]}" if names else None


def held_against(
    planned: Planned, spec: JobSpec, architecture: Architecture, fleet: Sequence[Chosen]
) -> tuple[list[Fault], str]:
    """Why a job may not follow a plan, and a note of the plan that it follows."""
    faults = []
    note = f"schemes by a plan for {planned.plan.hardware.label()}"
    if foreign := _of_other_hardware(planned, fleet):
        note += ", which no worker is"
        if not spec.quantization.planning.other_hardware:
            message = f"{foreign}, by plan.other_hardware: true"
            faults.append(Fault(field=PLAN, message=message, kind=ResourceError))
    if found := list(_mismatches(planned, spec, architecture)):
        more = f" (and {len(found) - 1} more like this)" if len(found) > 1 else ""
        faults.append(Fault(field=PLAN, message=found[0] + more))
    return faults, note


def _mismatches(planned: Planned, spec: JobSpec, architecture: Architecture) -> Iterator[str]:
    linears = {info.name: info for block in architecture.blocks for info in block.linears()}
    head = architecture.head or LinearInfo(
        "lm_head", architecture.vocabulary, architecture.hidden_size, "Linear"
    )
    schemes = planned.schemes
    for name in schemes:
        info = head if name == head.name else linears.get(name)
        if info is None:
            yield f"the plan names '{name}', which the model has not: name a plan of this model"
            continue
        shape = (info.out_features, info.in_features)
        said = planned.plan.shapes.get(name, shape)
        if said != shape:
            yield (
                f"'{name}' has {_shape(said)} in the plan and {_shape(shape)} in the model: name a "
                "plan of this model"
            )
    for name in linears:
        if name not in schemes and not _said_elsewhere(spec, name):
            yield (
                f"the plan says nothing of '{name}': plan anew, or name it in an override, with a "
                "scheme or skip: true"
            )


def _said_elsewhere(spec: JobSpec, name: str) -> bool:
    found = last_match(spec, name)
    return found is not None and (found[1].skip or found[1].scheme is not None)


def _shape(shape: tuple[int, int]) -> str:
    rows, columns = shape
    return f"{rows} outputs and {columns} inputs"


def is_of(plan: Plan, chosen: Chosen) -> bool:
    return plan.hardware == _as_planned(chosen, plan)


def _as_planned(chosen: Chosen, plan: Plan) -> HardwareKind:
    """Threads and kernels are taken as the plan has them: it was timed for how a model is served,
    and a worker's number of threads is that of its calibration.
    """
    return HardwareKind.of(chosen.kind, plan.hardware.kernels, plan.hardware.threads)


def _of_other_hardware(planned: Planned, fleet: Sequence[Chosen]) -> str | None:
    """Why a plan is not of these workers' kind, nor of any of theirs in a mixed fleet."""
    why = None
    for chosen in fleet:
        try:
            refuse_other_hardware(planned.plan, _as_planned(chosen, planned.plan))
        except ResourceError as error:
            why = why or str(error)
        else:
            return None
    return why
