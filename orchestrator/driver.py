"""The driver of one job: what comes after what, and the ledger's order.

    probe, if asked -> survey -> lease -> begin -> quantize, block by block -> index and config
           -> evaluate -> report -> manifest

The ledger in the store is the only state. Whatever ends a job early, running it again takes it up
after its last published block.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.bag import Bag
from orchestrator.checks import Prepared
from orchestrator.each_stored import begun_first
from orchestrator.executors import Executor
from orchestrator.identity import (
    Identity,
    begin,
    identity,
    refuse_difference,
    stored_job,
    with_content,
)
from orchestrator.lease import Beat, Lease, take, watch
from orchestrator.loop import Observer, Observers, Summaries, Timings, execute
from orchestrator.merge import commit, write_model
from orchestrator.picture import draw
from orchestrator.probe import probe_task, refuse_misfit, scaled
from orchestrator.profile import Profiler
from orchestrator.report import make_report
from orchestrator.scheduler import Work
from orchestrator.statistics import refuse_other_model, write_index
from orchestrator.works import quantization_works, survey_tasks
from quantcore.errors import LeaseError, QuantfleetError, SpecError
from workers.evaluate import read_text
from workers.layout import (
    KEPT,
    MANIFEST,
    OUTSIDE,
    PICTURE,
    REPORT,
    block_key,
    dump,
    kept_in,
    record_name,
)
from workers.plan import Plan
from workers.publish import read_record
from workers.store import STORE_PATIENCE_S, Store, open_store
from workers.survey import survey
from workers.tasks import Account, Evaluate, Task

SURVEY_BYTES = 4 << 30  # of one task, for workers whose many cores look at many tensors at once


@dataclass(slots=True)
class JobResult:
    store: str
    report: dict[str, Any]
    already_finished: bool = False


def run_job(
    prepared: Prepared, start_workers: Callable[[Plan], Executor], observer: Observer
) -> JobResult:
    """Do a job, or what is left of it. Raises the error tree's errors; finished blocks stay."""
    plan = prepared.plan
    conditional = plan.conditional_writes
    store = open_store(plan.store, conditional_writes=conditional, patience_s=STORE_PATIENCE_S)
    known = identity(prepared)
    previous = stored_job(store)
    if previous is not None:
        refuse_difference(store, previous["identity"], known)
        if store.exists(MANIFEST):
            observer.note("finished already")
            hashes = survey(prepared.source, prepared.source.tensors)
            refuse_difference(store, previous["identity"], with_content(known, hashes))
            return JobResult(store.url, _read_report(store), already_finished=True)
    elif begun_first(store) is not None:
        raise SpecError(
            f"{store.url}: this job was begun with plan.each_kind, and has its artifacts beside "
            "it: put that back, or choose another name"
        )
    beat = Beat.from_environment()

    def waiting(holder: dict[str, Any], seconds: float) -> None:
        observer.note("another driver was here", seconds=seconds, **holder)

    left = watch(store, beat, waiting)  # before anything is started for it
    profiler = Profiler()
    observer = Observers(observer, profiler)
    driver = _Driver(prepared, store, observer, profiler)
    observer.note("workers starting", devices=list(prepared.team.devices))
    executor = start_workers(plan)
    try:
        driver.timings.of_phase("start", driver.timings.started)
        observer.note("workers started", present=len(executor.present()))
        driver.probe(executor)
        content = with_content(known, driver.survey(executor))
        if prepared.statistics is not None:
            refuse_other_model(prepared.statistics, content)
        if previous is not None:
            refuse_difference(store, previous["identity"], content)
        lease = take(store, beat, left, waiting)  # only now: a model that is refused leaves nothing
        try:
            return driver.quantize(executor, content, lease)
        finally:
            lease.release()
    finally:
        executor.close()


@dataclass(slots=True)
class _Driver:
    prepared: Prepared
    store: Store
    observer: Observer
    profiler: Profiler
    timings: Timings = field(default_factory=Timings)
    probed: dict[str, Any] | None = None

    def probe(self, executor: Executor) -> None:
        """The worst block before all else, when asked. Raises ResourceError if it bodes ill."""
        spec = self.prepared.spec
        if not spec.workers.probe or spec.calibration is None or self.prepared.statistics:
            return
        task = probe_task(self.prepared)
        done = self._work("probe", [Bag({"probe": task}, heavy=True)], executor, 1)
        self.probed = scaled(self.prepared, task, done["probe"]["probe"])
        self.observer.note("probed", **self.probed)
        refuse_misfit(self.prepared, self.probed)

    def survey(self, executor: Executor) -> dict[str, str]:
        """The hash of every tensor of the model."""
        sizes = {name: info.num_bytes for name, info in self.prepared.source.tensors.items()}
        worth = 0 if self.prepared.device == "cpu" else SURVEY_BYTES
        runs = survey_tasks(sizes, len(executor.present()), worth)
        surveyed = self._work("survey", [Bag(runs)], executor, len(runs))
        return {name: h for part in surveyed.values() for name, h in part["hashes"].items()}

    def quantize(self, executor: Executor, content: Identity, lease: Lease) -> JobResult:
        prepared, plan, store = self.prepared, self.prepared.plan, self.store
        if store.exists(MANIFEST):  # by the driver that was waited for
            return JobResult(store.url, _read_report(store), already_finished=True)
        began = begin(store, prepared, content)
        keys = [block_key(block) for block in range(len(plan.blocks))]
        done = finished_keys(store, [*keys, OUTSIDE])
        kept = len(done & set(keys))
        self.observer.note("quantizing", blocks=len(keys), done=kept)
        works = quantization_works(
            plan,
            done,
            epoch=lease.epoch,
            chunk_bytes=chunk_bytes(prepared),
            losses_per_day=prepared.spec.workers.losses_per_day,
            kept=kept_in(store.list(f"{KEPT}/")),
        )
        self.profiler.begin(executor.present())
        self._work("quantize", works, executor, len(keys), kept, lease)
        self.profiler.end()
        self._account(executor)

        records = [read_record(store, key) for key in [*keys, OUTSIDE]]
        lease.check()
        if plan.keeps_statistics:
            write_index(store, plan, content["model (content)"], _origin(prepared))
        files = write_model(store, prepared, records)
        metrics = self._evaluate(executor, lease)
        texts = began.get("calibration")
        earlier = [block for block, key in enumerate(keys) if key in done]
        profile = self.profiler.profile(len(keys), earlier)
        report = make_report(prepared, texts, records, metrics, self.timings, profile, self.probed)
        lease.check()
        files[REPORT] = _put(store, REPORT, dump(report))
        files[PICTURE] = _put(store, PICTURE, draw(prepared.spec.name, profile))
        if prepared.planned is not None:
            files[prepared.planned.name] = _put(
                store, prepared.planned.name, prepared.planned.document
            )
        commit(store, prepared.spec.name, files)
        self.observer.note("committed", store=store.url, files=len(files))
        return JobResult(store.url, report)

    def _account(self, executor: Executor) -> None:
        """Each worker, idle by now, tells what it has not told yet of the time it spent."""
        tasks: dict[str, Task] = {f"account/{worker}": Account() for worker in executor.present()}
        execute([Bag(tasks)], executor, self.observer, self.timings)

    def _evaluate(self, executor: Executor, lease: Lease) -> dict[str, Any]:
        spec = self.prepared.spec.evaluation
        if spec is None:
            return {}
        variants = [*spec.baselines, "quantized"]
        text = read_text(spec)
        tasks: dict[str, Task] = {
            f"evaluate/{name}": Evaluate(name, spec, text) for name in variants
        }
        measured = self._work(
            "evaluate", [Bag(tasks, heavy=True)], executor, len(tasks), lease=lease
        )
        return {name: measured[f"evaluate/{name}"]["metrics"] for name in variants}

    def _work(
        self,
        phase: str,
        works: list[Work],
        executor: Executor,
        steps: int,
        done: int = 0,
        lease: Lease | None = None,
    ) -> Summaries:
        def may_go_on() -> None:
            if lease is not None and lease.lost:
                raise LeaseError(f"another driver has taken {self.store.url} over: this one stops")

        start = time.perf_counter()
        self.observer.phase(phase, steps, done)
        summaries = execute(works, executor, self.observer, self.timings, may_go_on)
        self.timings.of_phase(phase, start)
        return summaries


def chunk_bytes(prepared: Prepared) -> int:
    """How large one chunk's hidden states are."""
    plan = prepared.plan
    if plan.calibration is None:
        return 0
    tokens = plan.calibration.sequences * plan.calibration.length // plan.contract.chunks
    return tokens * prepared.architecture.hidden_size * plan.torch_dtype.itemsize


def _origin(prepared: Prepared) -> dict[str, Any]:
    """Whence a job's statistics come: its blocks' inputs have passed its own quantized blocks."""
    spec, plan = prepared.spec, prepared.plan
    assert spec.calibration is not None
    return {
        "job": spec.name,
        "quantization": spec.quantization.model_dump(mode="json"),
        "sequences": spec.calibration.sequences,
        "length": spec.calibration.length,
        "token_ids": prepared.tokens_digest,
        "kind": plan.contract.kind,
    }


def finished_keys(store: Store, keys: Sequence[str]) -> set[str]:
    """The keys that the ledger has a record for."""
    present = set(store.list("ledger/"))
    return {key for key in keys if record_name(key) in present}


def _put(store: Store, name: str, data: bytes) -> dict[str, Any]:
    store.put(name, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _read_report(store: Store) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(store.get(REPORT))
    except ValueError:
        raise QuantfleetError(f"{store.url}/{REPORT} is not JSON") from None
    return report
