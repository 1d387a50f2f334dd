"""Everything about a job that can be refused before any work starts, refused together."""

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch

from jobs.load import Document, Location, read_document, resolve_paths, validate
from jobs.spec import CalibrationSpec, EvaluationSpec, JobSpec
from orchestrator.admission import Prediction, peak
from orchestrator.fitting import Admitted, Job
from orchestrator.machines import Chosen, choose_fleet, unshared
from orchestrator.planning import PLAN, make_plan, plan_layers
from orchestrator.statistics import Statistics, read_index
from orchestrator.team import Team, admit_team
from quantcore.errors import Fault, JobFaults, QuantfleetError, SourceError, StoreError
from workers.architecture import Architecture, inspect
from workers.calibration import digest, token_windows
from workers.capacity import Disk, disk
from workers.documents import Windows, measured_tasks, task_windows
from workers.evaluate import read_text
from workers.harness import unknown_tasks
from workers.kind import compute_dtype
from workers.layout import STATISTICS_INDEX
from workers.machine import Machine, look
from workers.plan import MIXED, Plan
from workers.sources import ModelSource, open_source
from workers.store import LocalStore, missing_parents, open_store, probe

if TYPE_CHECKING:
    from orchestrator.planned import Planned

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job that may start."""

    spec: JobSpec
    plan: Plan
    source: ModelSource
    architecture: Architecture
    team: Team
    tokens_digest: str | None  # of the calibration's token ids
    sources: dict[str, int] = field(default_factory=dict)  # sequences by task and split
    notes: tuple[str, ...] = ()  # of what was allowed and may not have been meant
    statistics: Statistics | None = None  # that stand for texts
    planned: "Planned | None" = None  # what a plan says, with method: plan

    @property
    def device(self) -> str:
        """The fastest that it computes on."""
        return self.team.devices[0]

    @property
    def admitted(self) -> Admitted:
        """Of the fastest kind."""
        return self.team.parts[0][1]

    @property
    def prediction(self) -> Prediction:
        return self.admitted.prediction

    @property
    def workers(self) -> int:
        return len(self.team.devices)


class _Findings:
    """Faults so far, each given its place in the job file."""

    def __init__(self, document: Document, faults: list[Fault]) -> None:
        self._document = document
        self.faults = faults

    def add(self, *faults: Fault) -> None:
        for fault in faults:
            parts = fault.field.split(".")
            location: Location = tuple(int(p) if p.isdigit() else p for p in parts)
            if any(known.field == fault.field for known in self.faults):
                continue
            line, column = self._document.place(location)
            self.faults.append(dataclasses.replace(fault, line=line, column=column))

    def attempt(self, field: str, action: Callable[[], T]) -> T | None:
        """The action's result; its error, if it raises one of ours, becomes a fault of `field`."""
        try:
            return action()
        except QuantfleetError as error:
            named, _, rest = str(error).partition(": ")
            own = rest and " " not in named and "." in named and "/" not in named
            kind = type(error)
            message = rest if own else str(error)
            self.add(Fault(field=named if own else field, message=message, kind=kind))
            return None


Look = Callable[[Sequence[str]], Sequence[Machine]]  # all machines, and what they see of paths


def look_here(paths: Sequence[str]) -> Sequence[Machine]:
    return [look(paths)]


def check(path: Path, *, touch_store: bool = True, look_at: Look = look_here) -> Prepared:
    """Read a job file and look at all it names. Raises JobFaults with every fault found.

    `look_at` says what machines there are: by default, this one.
    """
    document = read_document(path)
    spec, faults = validate(document)
    if spec is None:
        raise JobFaults(str(path), faults)
    spec = resolve_paths(spec, path.absolute().parent)
    return prepare(spec, document, faults, touch_store=touch_store, look_at=look_at)


def prepare(
    spec: JobSpec,
    document: Document,
    faults: list[Fault],
    *,
    touch_store: bool = True,
    look_at: Look = look_here,
) -> Prepared:
    findings = _Findings(document, faults)
    source = findings.attempt(
        "model.path", lambda: open_source(spec.model.path, getattr(torch, spec.model.dtype))
    )
    architecture = findings.attempt("model.path", lambda: inspect(source)) if source else None
    places = _local_paths(spec)
    with _mark_in_store(spec, touch_store and look_at is not look_here) as mark:
        places |= mark
        machines = look_at(list(places))
    findings.add(*unshared(machines, places))
    fleet = findings.attempt("workers.kind", lambda: choose_fleet(machines, spec.workers.kind))
    if fleet and spec.compute_dtype == "auto":
        dtype = compute_dtype(chosen.kind for chosen in fleet)
        spec = spec.model_copy(update={"compute_dtype": dtype})
    if fleet and any(c.device == "cpu" for c in fleet) and spec.compute_dtype == "float16":
        message = "float16 is not for the CPU (hundreds of times slower): write float32 or bfloat16"
        findings.add(Fault(field="compute_dtype", message=message))
    windows = _calibration(spec, source, architecture, findings)
    statistics = _statistics(spec, architecture, findings)
    _evaluation(spec, findings)
    if touch_store:
        conditional = spec.output.conditional_writes
        store = spec.output.store
        findings.attempt(
            "output.store", lambda: probe(open_store(store, conditional_writes=conditional))
        )
    planned, plan_notes = _planned(spec, architecture, fleet or (), findings)
    plan, team = None, None
    if source and architecture and (planned or not spec.quantization.plan):
        if spec.calibration and spec.calibration.shards > len(architecture.blocks):
            count = len(architecture.blocks)
            message = f"the model has {count} blocks: write {count} shards or fewer"
            findings.add(Fault(field="calibration.shards", message=message))
            raise JobFaults(str(document.path), findings.faults)
        schemes = planned.schemes if planned else None
        blocks, head, layer_faults = plan_layers(spec, architecture, schemes)
        findings.add(*layer_faults)
        if fleet and not layer_faults:
            kind = MIXED if spec.workers.kind == "mixed" else fleet[0].kind
            records = statistics.records if statistics else ()
            ids_SL = windows.ids_SL if windows else None
            plan = make_plan(spec, blocks, head, kind, ids_SL, records)
            again = lambda other: make_plan(other, blocks, head, kind)  # noqa: E731
            job = Job(spec, plan, architecture, source, again)
            team, lacking = admit_team(job, fleet, _store_disk(spec))
            findings.add(*lacking)
            plan = dataclasses.replace(plan, states_on=team.states_on, model_version=source.version)
    if findings.faults:
        raise JobFaults(str(document.path), findings.faults)
    assert plan is not None and source is not None and architecture is not None
    assert team is not None
    return Prepared(
        spec=spec,
        plan=plan,
        source=source,
        architecture=architecture,
        team=team,
        tokens_digest=digest(windows.ids_SL) if windows else None,
        sources=windows.sources if windows else {},
        notes=(*plan_notes, *(windows.notes if windows else ())),
        statistics=statistics,
        planned=planned,
    )


def _store_disk(spec: JobSpec) -> Disk | None:
    """The disk of a store that is a folder."""
    if urlsplit(spec.output.store).scheme not in {"", "file"}:
        return None
    store = open_store(spec.output.store)
    return disk(Path(store.url))


def _local_paths(spec: JobSpec) -> dict[str, str]:
    """The paths that workers read, each with its field; of texts they are given what they need."""
    places = {}
    if not spec.model.path.startswith("s3://"):
        places[spec.model.path] = "model.path"
    kept = spec.calibration.statistics if spec.calibration else None
    if kept is not None and not kept.startswith("s3://"):
        places[f"{kept}/{STATISTICS_INDEX}"] = "calibration.statistics"
    if spec.evaluation is not None and spec.evaluation.task_folder is not None:
        places[str(spec.evaluation.task_folder)] = "evaluation.task_folder"
    return places


@contextlib.contextmanager
def _mark_in_store(spec: JobSpec, wanted: bool) -> Iterator[dict[str, str]]:
    """A file in a local store's folder for a moment: who shares the folder sees it."""
    store = open_store(spec.output.store) if wanted else None
    if not isinstance(store, LocalStore):
        yield {}
        return
    made = missing_parents(Path(store.url))
    name = f".quantfleet-mark-{secrets.token_hex(4)}"
    try:
        with contextlib.suppress(StoreError):  # `probe` says why
            store.put(name, secrets.token_bytes(16))
        yield {f"{store.url}/{name}": "output.store"}
    finally:
        with contextlib.suppress(StoreError):
            store.delete(name)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _calibration(
    spec: JobSpec,
    source: ModelSource | None,
    architecture: Architecture | None,
    findings: _Findings,
) -> Windows | None:
    """The calibration's token ids: workers are given them, and need not see the texts."""
    calibration = spec.calibration
    if calibration is None or calibration.statistics is not None:
        return None
    place = next(name for name in ("text", "jsonl", "tasks") if getattr(calibration, name))
    found = getattr(calibration, place)
    place = f"calibration.{place}"
    notes: list[str] = []
    if calibration.tasks:
        faults, notes = _tasks(calibration, spec.evaluation)
    else:
        missing = Fault(field=place, message=f"there is no file {found}", kind=SourceError)
        faults = [] if found.is_file() else [missing]
    if faults:
        findings.add(*faults)
        return None
    limit = architecture.max_length if architecture else None
    if limit is not None and calibration.length > limit:
        findings.add(
            Fault(
                field="calibration.length",
                message=f"the model takes at most {limit} tokens: write {limit} or less",
            )
        )
    if source is None:
        return None
    tokenizer = findings.attempt("model.path", source.tokenizer)
    if tokenizer is None:
        return None
    if not calibration.tasks:
        ids_SL = findings.attempt(place, lambda: token_windows(calibration, tokenizer))
        return None if ids_SL is None else Windows(ids_SL)
    windows = findings.attempt(place, lambda: task_windows(calibration, tokenizer))
    return windows and dataclasses.replace(windows, notes=tuple(notes))


def _tasks(
    calibration: CalibrationSpec, evaluation: EvaluationSpec | None
) -> tuple[list[Fault], list[str]]:
    """What is wrong with the calibration's tasks, and what is allowed and is to be known.

    What the evaluation measures by is no calibration, unless the job names the very split.
    """
    faults = _unknown(calibration.tasks, calibration.task_folder, "calibration")
    both = [] if faults else measured_tasks(calibration, evaluation)
    notes = []
    for name, split in both:
        said = f"the {split} split of '{name}' is what evaluation.tasks measures by"
        if calibration.split is not None:
            notes.append(f"calibrated with what is measured: {said}")
            continue
        instead = f"name another task, or write calibration.split: {split} to take it all the same"
        faults.append(Fault(field="calibration.tasks", message=f"{said}: {instead}"))
    return faults, notes


def _unknown(tasks: Sequence[str], folder: Path | None, section: str) -> list[Fault]:
    if folder is not None and not folder.is_dir():
        message = f"there is no folder {folder}"
        return [Fault(field=f"{section}.task_folder", message=message, kind=SourceError)]
    return [
        Fault(
            field=f"{section}.tasks",
            message=f"lm-eval knows no task '{name}': see lm-eval ls tasks, or set task_folder",
        )
        for name in unknown_tasks(tasks, folder)[:1]
    ]


def _statistics(
    spec: JobSpec, architecture: Architecture | None, findings: _Findings
) -> Statistics | None:
    if spec.calibration is None or spec.calibration.statistics is None or architecture is None:
        return None
    url = spec.calibration.statistics
    return findings.attempt(
        "calibration.statistics", lambda: read_index(open_store(url), architecture)
    )


def _planned(
    spec: JobSpec,
    architecture: Architecture | None,
    fleet: Sequence[Chosen],
    findings: _Findings,
) -> tuple["Planned | None", tuple[str, ...]]:
    """The plan that the job names, if it may be used, with what is to be known of it."""
    named = spec.quantization.plan
    if named is None:
        return None, ()
    from orchestrator.planned import held_against, read_planned  # and scipy: 0.7 s

    planned = findings.attempt(PLAN, lambda: read_planned(named.path))
    if planned is None or architecture is None:
        return None, ()
    faults, note = held_against(planned, spec, architecture, fleet)
    findings.add(*faults)
    return (None if faults else planned), (note,)


def _evaluation(spec: JobSpec, findings: _Findings) -> None:
    evaluation = spec.evaluation
    if evaluation is None:
        return
    if evaluation.text is not None and not evaluation.text.is_file():
        message = f"there is no file {evaluation.text}"
        findings.add(Fault(field="evaluation.text", message=message, kind=SourceError))
    findings.attempt("evaluation.text", lambda: read_text(evaluation))
    findings.add(*_unknown(evaluation.tasks, evaluation.task_folder, "evaluation"))


def describe(prepared: Prepared) -> dict[str, Any]:
    """What the plan comes to, for people and for --json."""
    schemes: dict[str, int] = {}
    for layer in prepared.plan.layers():
        label = f"{layer.scheme.label()} {layer.method}" if layer.scheme else "kept as it is"
        schemes[label] = schemes.get(label, 0) + 1
    contract = prepared.plan.contract
    return {
        "job": prepared.spec.name,
        "model": prepared.architecture.model_type,
        "blocks": len(prepared.plan.blocks),
        "layers": schemes,
        "devices": [
            {**chosen.kind, "workers": admitted.prediction.workers}
            for chosen, admitted in prepared.team.parts
        ],
        "workers": prepared.workers,
        "threads": contract.threads,
        "compute_dtype": contract.compute_dtype,
        "micro_batch": contract.micro_batch,
        "chunks": contract.chunks,
        "store": prepared.plan.store,
        "predicted": predicted(prepared),
    }


def predicted(prepared: Prepared) -> dict[str, Any]:
    """What admission told, as plain values; bytes are at most, seconds are an estimate."""
    prediction = prepared.prediction
    host, _ = peak(prediction.host)
    device = peak(prediction.device)[0] if prediction.device else None
    return {
        "worker": {
            "host": {"bytes": prediction.host_bytes, "phase": host, "phases": prediction.host},
            "device": {
                "bytes": prediction.device_bytes,
                "phase": device,
                "phases": prediction.device,
            },
            "scratch_bytes": prediction.scratch,
        },
        "job": {
            "object_store_bytes": prediction.object_store,
            "store_bytes": prediction.store,
            "network_bytes": prediction.network,
            "seconds": {phase: round(s, 1) for phase, s in prediction.seconds.items()},
        },
        "rates": prediction.rates.said,
        "hidden_states_on": prediction.states_on,
        "notes": [*prepared.notes, *prepared.admitted.notes],
    }
