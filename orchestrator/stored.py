"""What a store tells of its jobs, without the job files that began them."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from jobs.load import Document
from jobs.spec import EvaluationSpec, JobSpec
from orchestrator.driver import finished_keys
from orchestrator.each_stored import artifacts_in, stored_each
from orchestrator.fetch import fetch
from orchestrator.identity import stored_job
from quantcore.errors import SourceError, SpecError, StoreError
from workers.evaluate import evaluate, read_text
from workers.harness import unknown_tasks
from workers.layout import CALIBRATION, EVALUATION, JOB, MANIFEST, PLANS, block_key
from workers.loading import load
from workers.store import LocalStore, Store, open_store


def stored_spec(began: dict[str, Any], url: str) -> tuple[JobSpec, Document]:
    """The spec a job was begun with, its output where the job now stands: stores are moved."""
    try:
        spec = JobSpec.model_validate_json(json.dumps(began["spec"]))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise StoreError(f"{url}/{JOB} was written by another version ({what})") from None
    parent, _, name = url.rpartition("/")
    output = spec.output.model_copy(update={"store": parent or "/"})
    spec = spec.model_copy(update={"name": name, "output": output})
    return spec, Document(Path(JOB), began["spec"], {})


@contextlib.contextmanager
def kept_texts(store: Store, spec: JobSpec) -> Iterator[JobSpec]:
    """The spec reading its texts as the ledger has them: the files themselves may be gone."""
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        changes: dict[str, Any] = {}
        if spec.calibration is not None and store.exists(CALIBRATION):
            jsonl = Path(scratch) / Path(CALIBRATION).name
            store.get_file(CALIBRATION, jsonl)
            update: dict[str, Any] = {"jsonl": jsonl, "field": "ids", "short": "pad", "tasks": ()}
            update |= dict.fromkeys(("text", "task_folder", "limit", "split"))
            changes["calibration"] = spec.calibration.model_copy(update=update)
        if spec.evaluation is not None and store.exists(EVALUATION):
            text = Path(scratch) / Path(EVALUATION).name
            store.get_file(EVALUATION, text)
            changes["evaluation"] = spec.evaluation.model_copy(update={"text": text})
        plan = spec.quantization.plan
        if plan is not None and plan.path is not None:  # else it stands where it was found
            kept = f"{store.url}/{_kept_plan(store)}"
            named = {"plan": plan.model_copy(update={"path": kept})}
            changes["quantization"] = spec.quantization.model_copy(update=named)
        yield spec.model_copy(update=changes)


def _kept_plan(store: Store) -> str:
    names = store.list(f"{PLANS}/")
    if not names:
        raise StoreError(f"{store.url}/{PLANS} holds no plan, and the job follows one")
    return names[0]


def job_status(store: Store) -> dict[str, Any]:
    """How far a job has come; with an artifact for each kind, how far each of them has."""
    began = stored_job(store)
    if began is None and stored_each(store) is not None:
        each = [_begun_or_not(one) for one in artifacts_in(store)]
        finished = all(facts["finished"] for facts in each)
        name = store.url.rpartition("/")[2]
        return {"job": name, "store": store.url, "artifacts": each, "finished": finished}
    if began is None:
        raise StoreError(f"{store.url} holds no job: see quantfleet list")
    kept, total = kept_blocks(store)
    return {
        "job": began["spec"]["name"],
        "store": store.url,
        "scheme": began["spec"]["quantization"]["scheme"] or "by plan",
        "blocks": total,
        "blocks_done": kept,
        "finished": store.exists(MANIFEST),
    }


def _begun_or_not(store: Store) -> dict[str, Any]:
    if stored_job(store) is not None:
        return job_status(store)
    name = store.url.rpartition("/")[2]
    return {"job": name, "store": store.url, "blocks": None, "blocks_done": 0, "finished": False}


def kept_blocks(store: Store) -> tuple[int, int]:
    """Blocks with a ledger record, and blocks in all; (0, 0) for a job that was never begun."""
    began = stored_job(store)
    if began is None:
        return 0, 0
    keys = [block_key(block) for block in range(began["blocks"])]
    return len(finished_keys(store, keys)), len(keys)


def jobs_in(store: Store) -> list[dict[str, Any]]:
    if isinstance(store, LocalStore) and not Path(store.url).is_dir():
        raise StoreError(f"there is no folder {store.url}: name the store, not a job in it")
    suffix = f"/{JOB}"
    names = [n.removesuffix(suffix) for n in store.list() if n.endswith(suffix)]
    return [job_status(open_store(f"{store.url}/{name}")) for name in names]


def evaluate_stored(model: str, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Evaluate a fetched folder, or a finished job fetched for the purpose."""
    from transformers import AutoTokenizer

    if dtype not in {"float32", "bfloat16", "float16"}:
        raise SpecError(f"--dtype: unknown '{dtype}': write float32 or bfloat16")
    try:
        spec = EvaluationSpec.model_validate(options)
    except ValidationError as error:
        raise SpecError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if unknown := unknown_tasks(spec.tasks, spec.task_folder):
        raise SpecError(f"--tasks: lm-eval knows no task '{unknown[0]}'")
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            if not model.startswith("s3://") and not folder.is_dir():
                raise SourceError(f"there is no {model}: name a fetched folder or a job")
            folder = Path(scratch) / "model"
            fetch(open_store(model), folder)
        loaded = load(folder, getattr(torch, dtype), inductor_settings=False)
        return evaluate(loaded, AutoTokenizer.from_pretrained(folder), spec, read_text(spec))
