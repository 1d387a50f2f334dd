"""Everything about a job that can be refused before any work starts, refused together."""

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch

from jobs.load import Document, read_document, resolve_paths, validate
from jobs.spec import JobSpec
from orchestrator.admission import Prediction
from orchestrator.findings import Findings
from orchestrator.fitting import Admitted, Job
from orchestrator.inputs import calibration_windows, kept_statistics, look_at_evaluation
from orchestrator.machines import Chosen, choose_fleet, unshared
from orchestrator.planning import PLAN, make_plan, plan_layers
from orchestrator.statistics import Statistics
from orchestrator.team import Team, admit_team
from quantcore.errors import Fault, JobFaults, StoreError
from workers.architecture import Architecture
from workers.calibration import digest
from workers.capacity import Disk, disk
from workers.inspected import architecture_of
from workers.kind import compute_dtype
from workers.layout import STATISTICS_INDEX
from workers.machine import Machine, look
from workers.plan import MIXED, Plan
from workers.remembered import Memory
from workers.sources import ModelSource, open_source
from workers.store import LocalStore, missing_parents, open_store, probe
from workers.tokens import KnownTokenizer

if TYPE_CHECKING:
    from orchestrator.planned import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job that may start."""

    spec: JobSpec
    plan: Plan
    source: ModelSource
    tokenizer: KnownTokenizer
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


Look = Callable[[Sequence[str]], Sequence[Machine]]  # all machines, and what they see of paths


def look_here(paths: Sequence[str]) -> Sequence[Machine]:
    return [look(paths)]


def check(path: Path, *, touch_store: bool = True, look_at: Look = look_here) -> Prepared:
    """Read a job file and look at all it names. Raises JobFaults with every fault found.

    `look_at` says what machines there are: by default, this one.
    """
    spec, document, faults = read_job(path)
    return prepare(spec, document, faults, touch_store=touch_store, look_at=look_at)


def read_job(path: Path) -> tuple[JobSpec, Document, list[Fault]]:
    """A job file alone, its paths absolute, and its faults so far.

    Raises JobFaults where too little remains without the faulty keys.
    """
    document = read_document(path)
    spec, faults = validate(document)
    if spec is None:
        raise JobFaults(str(path), faults)
    return resolve_paths(spec, path.absolute().parent), document, faults


def prepare(
    spec: JobSpec,
    document: Document,
    faults: list[Fault],
    *,
    touch_store: bool = True,
    look_at: Look = look_here,
) -> Prepared:
    findings, memory = Findings(document, faults), Memory()
    source = findings.attempt(
        "model.path", lambda: open_source(spec.model.path, getattr(torch, spec.model.dtype))
    )
    inspected = partial(architecture_of, source, memory) if source else None
    architecture = findings.attempt("model.path", inspected) if inspected else None
    tokenizer = KnownTokenizer(source, memory) if source else None
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
    windows = calibration_windows(spec, tokenizer, architecture, findings)
    statistics = kept_statistics(spec, architecture, findings)
    look_at_evaluation(spec, findings)
    if touch_store:
        conditional = spec.output.conditional_writes
        store = spec.output.store
        findings.attempt(
            "output.store", lambda: probe(open_store(store, conditional_writes=conditional))
        )
    planned, plan_notes = _planned(spec, architecture, fleet or (), findings)
    plan, team = None, None
    if source and architecture and (planned or spec.quantization.method != "plan"):
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
    assert team is not None and tokenizer is not None
    return Prepared(
        spec=spec,
        plan=plan,
        source=source,
        tokenizer=tokenizer,
        architecture=architecture,
        team=team,
        tokens_digest=digest(windows.ids_SL) if windows else None,
        sources=windows.sources if windows else {},
        notes=(*plan_notes, *(windows.notes if windows else ()), *memory.warnings),
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


def _planned(
    spec: JobSpec,
    architecture: Architecture | None,
    fleet: Sequence[Chosen],
    findings: Findings,
) -> tuple["Planned | None", tuple[str, ...]]:
    """The plan that the job names, if it may be used, with what is to be known of it."""
    if spec.quantization.method != "plan":
        return None, ()
    assert not spec.quantization.planning.each_kind, "orchestrator/each_kind.py has a job for each"
    from orchestrator.planned import held_against, left_in_store, read_planned  # and scipy: 0.7 s

    place = spec.quantization.planning.path
    found = findings.attempt(
        PLAN, lambda: (read_planned(place), ()) if place else left_in_store(spec, fleet)
    )
    planned, notes = found or (None, ())
    if planned is None or architecture is None:
        return None, ()
    faults, note = held_against(planned, spec, architecture, fleet)
    findings.add(*faults)
    return (None if faults else planned), (note, *notes)
