"""Everything about a job that can be refused before any work starts, refused together."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from jobs.load import Document, Location, read_document, resolve_paths, validate
from jobs.spec import JobSpec
from orchestrator.admission import worker_bytes
from orchestrator.planning import make_plan, plan_layers
from quantcore.errors import Fault, JobFaults, QuantfleetError, ResourceError, SourceError
from workers.architecture import Architecture, inspect
from workers.calibration import digest, token_windows
from workers.evaluate import unknown_tasks
from workers.kind import device_count, hardware_kind, pick_device
from workers.plan import Plan
from workers.sources import ModelSource, open_source
from workers.store import open_store, probe

T = TypeVar("T")
_MAX_DEFAULT_WORKERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job that may start."""

    spec: JobSpec
    plan: Plan
    source: ModelSource
    architecture: Architecture
    device: str
    workers: int
    worker_memory: dict[str, int]  # predicted bytes by part
    tokens_digest: str | None  # of the calibration's token ids


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


def check(path: Path, *, touch_store: bool = True) -> Prepared:
    """Read a job file and look at all it names. Raises JobFaults with every fault found."""
    document = read_document(path)
    spec, faults = validate(document)
    if spec is None:
        raise JobFaults(str(path), faults)
    spec = resolve_paths(spec, path.absolute().parent)
    return prepare(spec, document, faults, touch_store=touch_store)


def prepare(
    spec: JobSpec, document: Document, faults: list[Fault], *, touch_store: bool = True
) -> Prepared:
    findings = _Findings(document, faults)
    source = findings.attempt(
        "model.path", lambda: open_source(spec.model.path, getattr(torch, spec.model.dtype))
    )
    architecture = findings.attempt("model.path", lambda: inspect(source)) if source else None
    device = findings.attempt("workers.kind", lambda: pick_device(spec.workers.kind))
    if device == "cpu" and spec.compute_dtype == "float16":
        message = "float16 is not for the CPU (hundreds of times slower): write float32 or bfloat16"
        findings.add(Fault(field="compute_dtype", message=message))
    tokens = _calibration(spec, source, architecture, findings)
    _evaluation(spec, findings)
    if touch_store:
        findings.attempt("output.store", lambda: probe(open_store(spec.output.store)))
    plan, workers, memory = None, 0, {}
    if source and architecture:
        blocks, head, layer_faults = plan_layers(spec, architecture)
        findings.add(*layer_faults)
        if device:
            plan = make_plan(spec, blocks, head, hardware_kind(device))
            memory = worker_bytes(spec, plan, architecture, source)
            workers = _workers(spec, plan, device, sum(memory.values()), findings)
    if findings.faults:
        raise JobFaults(str(document.path), findings.faults)
    assert plan is not None and source is not None and architecture is not None and device
    return Prepared(
        spec=spec,
        plan=plan,
        source=source,
        architecture=architecture,
        device=device,
        workers=workers,
        worker_memory=memory,
        tokens_digest=tokens,
    )


def _calibration(
    spec: JobSpec,
    source: ModelSource | None,
    architecture: Architecture | None,
    findings: _Findings,
) -> str | None:
    calibration = spec.calibration
    if calibration is None:
        return None
    file, field = calibration.text, "calibration.text"
    if file is None:
        file, field = calibration.jsonl, "calibration.jsonl"
    assert file is not None
    if not file.is_file():
        findings.add(Fault(field=field, message=f"there is no file {file}", kind=SourceError))
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
    windows = findings.attempt(field, lambda: token_windows(calibration, tokenizer))
    return None if windows is None else digest(windows)


def _evaluation(spec: JobSpec, findings: _Findings) -> None:
    evaluation = spec.evaluation
    if evaluation is None:
        return
    if evaluation.text is not None and not evaluation.text.is_file():
        message = f"there is no file {evaluation.text}"
        findings.add(Fault(field="evaluation.text", message=message, kind=SourceError))
    if evaluation.task_folder is not None and not evaluation.task_folder.is_dir():
        message = f"there is no folder {evaluation.task_folder}"
        findings.add(Fault(field="evaluation.task_folder", message=message, kind=SourceError))
    elif unknown := unknown_tasks(evaluation):
        message = f"lm-eval knows no task '{unknown[0]}': see lm-eval ls tasks, or set task_folder"
        findings.add(Fault(field="evaluation.tasks", message=message))


def _workers(spec: JobSpec, plan: Plan, device: str, need: int, findings: _Findings) -> int:
    """How many workers to start: what the job says, or what the machine and the job carry."""
    wanted = spec.workers
    allowed = wanted.memory_bytes()
    if allowed is not None and need > allowed:
        message = f"a worker is predicted to need {_gib(need)}: write memory: {_gib(need)}"
        findings.add(Fault(field="workers.memory", message=message, kind=ResourceError))
    most = plan.contract.chunks if plan.calibration is not None else len(plan.blocks)
    devices = device_count(device)
    available = psutil.virtual_memory().available
    room = int(available // need)
    if room == 0:
        message = f"a worker needs {_gib(need)} and this machine has {_gib(available)} free"
        findings.add(Fault(field="workers.memory", message=message, kind=ResourceError))
    if wanted.count is None:
        per_worker = wanted.threads if device == "cpu" else 1
        return max(1, min(devices // per_worker, most, room, _MAX_DEFAULT_WORKERS))
    if device != "cpu" and wanted.count > devices:
        message = f"this machine has {devices} {device} devices: write count: {devices}"
        findings.add(Fault(field="workers.count", message=message, kind=ResourceError))
    elif wanted.count > room > 0:
        message = (
            f"{wanted.count} workers of {_gib(need)} do not fit in the {_gib(available)} that are "
            f"free: write count: {room}"
        )
        findings.add(Fault(field="workers.count", message=message, kind=ResourceError))
    elif wanted.count > most:
        what = "calibration sequences" if plan.calibration else "blocks"
        message = f"only {most} workers can share these {what}: write count: {most}"
        findings.add(Fault(field="workers.count", message=message))
    return wanted.count


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}GiB"


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
        "device": contract.kind,
        "workers": prepared.workers,
        "threads": contract.threads,
        "worker_memory_bytes": prepared.worker_memory,
        "micro_batch": contract.micro_batch,
        "chunks": contract.chunks,
        "store": prepared.plan.store,
    }
