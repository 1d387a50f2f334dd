"""`plan: {each_kind: true}`: an artifact by every plan in a job's folder, from one calibration.

    STORE/NAME/plan/NVIDIA_H200.json      and others: what quantfleet plan left
               ledger/each-kind.json      the spec, and which artifact the texts were run for
    STORE/NAME-NVIDIA_H200/               a job of its own, as all of them are
    STORE/NAME-AMD_EPYC/

The first job runs the texts through its own quantized blocks, as it would if it were alone, and
keeps the statistics. The others are jobs over these, whichever kinds their plans are for. A run
through unquantized blocks would be the same to all, and correct the errors of none; so the first is
the one whose plan loses most, to which that is worth most, and it stays so once begun: the others'
inputs came through it. Nothing else ties them: each has a ledger, a lease, an identity and a
manifest of its own, is taken up by itself, and a plan that comes later is one job more.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from jobs.load import Document
from jobs.plan import PlanSpec
from jobs.spec import NAME, CalibrationSpec, JobSpec
from orchestrator.checks import Look, Prepared, look_here, prepare
from orchestrator.driver import JobResult
from orchestrator.each_stored import begun_first, is_dense
from orchestrator.findings import Findings
from orchestrator.identity import stored_job
from orchestrator.planned import (
    Planned,
    artifact_name,
    asked_otherwise,
    held_against,
    plans_in_store,
    read_planned,
)
from orchestrator.planning import PLAN, plan_layers
from quantcore.autoquant.telling import errors_told
from quantcore.errors import Fault, JobFaults, QuantfleetError, SpecError
from workers.architecture import Architecture
from workers.inspected import architecture_of
from workers.layout import EACH_KIND, dump
from workers.remembered import Memory
from workers.sources import open_source
from workers.store import Store, open_store

_EACH = "quantization.plan.each_kind"


@dataclass(frozen=True, slots=True)
class Artifact:
    spec: JobSpec  # of the job that makes it
    place: str  # of the plan, in the store
    planned: Planned

    @property
    def hardware(self) -> str:
        return self.planned.plan.hardware.label()


@dataclass(frozen=True, slots=True)
class EachKind:
    """A job that may start: all its plans are read, and held against its model and format."""

    spec: JobSpec  # as it is written
    document: Document
    artifacts: tuple[Artifact, ...]  # that which the texts are run for is the first
    first: Prepared

    @property
    def store(self) -> Store:
        return open_store(_folder(self.spec))

    def prepared(self, artifact: Artifact, look_at: Look = look_here) -> Prepared:
        """When its turn comes: before, there are no statistics to look at."""
        if artifact is self.artifacts[0]:
            return self.first
        return prepare(artifact.spec, self.document, [], look_at=look_at)

    def begin(self) -> None:
        """Leave in the store what it takes to go on from there. Once texts were run it stays."""
        if begun_first(self.store) is None:
            first = self.artifacts[0].spec.name
            record = {"spec": self.spec.model_dump(mode="json"), "first": first}
            self.store.put(EACH_KIND, dump(record))


def check_each(
    spec: JobSpec,
    document: Document,
    faults: list[Fault],
    *,
    touch_store: bool = True,
    look_at: Look = look_here,
) -> EachKind:
    """Look at all that a job with each_kind names. Raises JobFaults with every fault found."""
    findings = Findings(document, faults)
    told = findings.attempt(_EACH, lambda: _artifacts(spec))
    if told is None:
        raise JobFaults(str(document.path), findings.faults)
    found, left = told
    first = None
    try:
        first = prepare(
            found[0].spec, document, findings.faults, touch_store=touch_store, look_at=look_at
        )
        architecture: Architecture | None = first.architecture
    except JobFaults:
        architecture = _architecture(spec)
    faults = findings.faults
    if architecture is not None:
        for fault in [one for of in found for one in _held(of, architecture, document)]:
            if fault.field == _EACH:
                faults.append(fault)
            else:
                findings.add(fault)
        faults = [fault for fault in faults if fault.field != PLAN]  # told with the plan's kind
    if faults or first is None:
        raise JobFaults(str(document.path), faults)
    notes = (*_notes(found), *left, *first.notes)
    return EachKind(spec, document, found, replace(first, notes=notes))


def _artifacts(spec: JobSpec) -> tuple[tuple[Artifact, ...], tuple[str, ...]]:
    """By every plan in the job's folder that chooses something, and notes of the others.

    Raises SpecError for a plan that the job does not ask for.
    """
    folder = open_store(_folder(spec))
    if stored_job(folder) is not None:
        raise SpecError(
            f"{folder.url}: the job was begun, and follows one plan: write another name for an "
            "artifact for each kind"
        )
    plans = {}
    for place in plans_in_store(spec):
        planned = read_planned(place)
        label = planned.plan.hardware.label()
        if (asked := asked_otherwise(spec, planned.plan)) is not None:
            raise SpecError(f"the plan for {label} {asked}: run quantfleet plan again")
        name = artifact_name(spec.name, planned.plan.hardware)
        if not re.match(NAME, name):
            raise SpecError(
                f"name: the artifact by the plan for {label} would be named '{name}': write a "
                "shorter one"
            )
        plans[name] = (place, planned)
    dense = [name for name, (_, planned) in plans.items() if _needs_none(spec, planned)]
    if len(dense) < len(plans):  # else that is told as what is wrong
        left = tuple(_left_dense(plans.pop(name)[1]) for name in dense)
    else:
        left = ()
    first = begun_first(folder) or _first(plans)
    if first not in plans:
        raise SpecError(
            f"{first} was calibrated by a plan that is no longer in {folder.url}: put it back, or "
            "write another name"
        )
    names = [first, *(name for name in plans if name != first)]
    artifacts = (
        Artifact(_spec_of(spec, name, first, plans[name][0]), *plans[name]) for name in names
    )
    return tuple(artifacts), left


def _left_dense(planned: Planned) -> str:
    return (
        f"no artifact for {planned.plan.hardware.label()}: its plan leaves every linear dense, so "
        "the model serves there as it is"
    )


def _needs_none(spec: JobSpec, planned: Planned) -> bool:
    """Whether the model serves as it is on a plan's kind: no job has anything to do for it."""
    own_schemes = any(override.scheme for override in spec.quantization.overrides)
    return not own_schemes and is_dense(planned.document)


def _first(plans: Mapping[str, tuple[str, Planned]]) -> str:
    """That which is predicted to lose most: solving for its own errors is worth most to it.

    Whose kind the workers are plays no part, so that the artifacts hang on the plans alone.
    """
    return max(plans, key=lambda name: plans[name][1].plan.choice.totals.error)


def _spec_of(spec: JobSpec, name: str, first: str, place: str) -> JobSpec:
    """Of the job that makes one artifact."""
    calibration = spec.calibration
    if calibration is not None and calibration.statistics is None:
        if name == first:
            calibration = calibration.model_copy(update={"keep_statistics": True})
        else:
            kept = f"{spec.output.store.rstrip('/')}/{first}"
            calibration = CalibrationSpec(statistics=kept)
    rounding = spec.quantization.planning.rounding
    plan = PlanSpec(path=place, rounding=rounding, other_hardware=True)
    quantization = spec.quantization.model_copy(update={"plan": plan})
    return spec.model_copy(
        update={"name": name, "quantization": quantization, "calibration": calibration}
    )


def _held(artifact: Artifact, architecture: Architecture, document: Document) -> list[Fault]:
    """What speaks against a plan, and is said with its kind, or against the job under it."""
    spec, planned = artifact.spec, artifact.planned
    faults, _ = held_against(planned, spec, architecture, ())
    if not faults:
        _, _, faults = plan_layers(spec, architecture, planned.schemes)
    told = f"the plan for {artifact.hardware}: "
    instead = f"; or take {artifact.place} away, and only the others are made"
    return [
        document.fault(tuple(_EACH.split(".")), told + fault.message + instead, kind=fault.kind)
        if fault.field == PLAN
        else fault
        for fault in faults
    ]


def _architecture(spec: JobSpec) -> Architecture | None:
    with contextlib.suppress(QuantfleetError):
        source = open_source(spec.model.path, getattr(torch, spec.model.dtype))
        return architecture_of(source, Memory())
    return None


def _notes(artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    first, *others = artifacts
    count = f"{len(artifacts)} artifacts, one for each plan" if others else "one plan, one artifact"
    if not others or first.spec.calibration is None:
        return (count,)
    if first.spec.calibration.statistics is not None:
        return (f"{count}, all from the same statistics",)
    return (
        f"{count}: the texts are run once, through the blocks of {first.spec.name}; the others "
        "are made from the statistics it keeps",
    )


def facts(artifact: Artifact, result: JobResult) -> dict[str, Any]:
    """An artifact beside what its plan predicts."""
    report, plan = result.report, artifact.planned.plan
    return {
        "job": artifact.spec.name,
        "hardware": artifact.hardware,
        "store": result.store,
        "plan": artifact.place,
        "predicted": asdict(plan.choice.totals),
        "errors": errors_told(plan),
        "bytes": report["bytes"]["quantized"],
        "evaluation": report["evaluation"].get("quantized", {}),
        "inputs": _inputs(report),
        "already_finished": result.already_finished,
        "report": report,
    }


def _inputs(report: Mapping[str, Any]) -> str:
    """What the linears were quantized for."""
    if report["statistics"]:
        job = report["statistics"]["job"]
        return f"from statistics: inputs that came through the quantized blocks of {job}"
    if report["calibration"]:
        return "calibrated: inputs came through its own quantized blocks"
    return "without texts"


def _folder(spec: JobSpec) -> str:
    return f"{spec.output.store.rstrip('/')}/{spec.name}"
