"""What a job reads beside its model, looked at before it starts: texts, tasks, kept statistics."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jobs.spec import CalibrationSpec, EvaluationSpec, JobSpec
from orchestrator.findings import Findings
from orchestrator.statistics import Statistics, read_index
from quantcore.errors import Fault, SourceError
from workers.architecture import Architecture
from workers.calibration import token_windows
from workers.documents import Windows, measured_tasks, task_windows
from workers.evaluate import read_text
from workers.harness import unknown_tasks
from workers.store import open_store
from workers.tokens import KnownTokenizer


def calibration_windows(
    spec: JobSpec,
    tokenizer: KnownTokenizer | None,
    architecture: Architecture | None,
    findings: Findings,
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


def kept_statistics(
    spec: JobSpec, architecture: Architecture | None, findings: Findings
) -> Statistics | None:
    if spec.calibration is None or spec.calibration.statistics is None or architecture is None:
        return None
    url = spec.calibration.statistics
    return findings.attempt(
        "calibration.statistics", lambda: read_index(open_store(url), architecture)
    )


def look_at_evaluation(spec: JobSpec, findings: Findings) -> None:
    evaluation = spec.evaluation
    if evaluation is None:
        return
    if evaluation.text is not None and not evaluation.text.is_file():
        message = f"there is no file {evaluation.text}"
        findings.add(Fault(field="evaluation.text", message=message, kind=SourceError))
    findings.attempt("evaluation.text", lambda: read_text(evaluation))
    findings.add(*_unknown(evaluation.tasks, evaluation.task_folder, "evaluation"))
