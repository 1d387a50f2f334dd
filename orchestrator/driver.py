"""The driver of one job: carries the scheduler's instructions out and keeps the ledger's order.

    survey -> begin -> quantize, block by block -> index and config -> evaluate -> report
           -> manifest

The ledger in the store is the only state. Whatever ends a job early, running it again takes it up
after its last published block.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checks import Prepared
from orchestrator.executors import Executor, Result
from orchestrator.graph import Node, evaluation_graph, quantization_graph, survey_graph
from orchestrator.identity import begin, identity, refuse_difference, stored_job, with_content
from orchestrator.merge import commit, write_model
from orchestrator.report import make_report
from orchestrator.scheduler import (
    Event,
    Failed,
    Finished,
    Release,
    Run,
    Scheduler,
    Started,
    Stop,
    WorkerLost,
)
from quantcore.errors import QuantfleetError
from workers.layout import MANIFEST, OUTSIDE, REPORT, block_key, dump, record_name
from workers.plan import Plan
from workers.publish import read_record
from workers.store import Store, open_store


class Observer:
    """What a driver tells while it works; the base class listens and says nothing."""

    def phase(self, name: str, nodes: Sequence[Node]) -> None: ...
    def submitted(self, node: Node, worker: int) -> None: ...
    def finished(self, node: Node, result: Result) -> None: ...
    def note(self, event: str, **facts: Any) -> None: ...


@dataclass(slots=True)
class JobResult:
    store: str
    report: dict[str, Any]
    already_finished: bool = False


@dataclass(slots=True)
class _Timings:
    started: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, list[float]] = field(default_factory=dict)

    def of_phase(self, name: str, start: float) -> None:
        self.phases[name] = round(time.perf_counter() - start, 3)

    def of_task(self, result: Result) -> None:
        self.tasks.setdefault(result.task.split("/")[0], []).append(result.seconds)


def run_job(
    prepared: Prepared, start_workers: Callable[[Plan], Executor], observer: Observer
) -> JobResult:
    """Do a job, or what is left of it. Raises the error tree's errors; finished blocks stay."""
    plan = prepared.plan
    store = open_store(plan.store)
    known = identity(prepared)
    previous = stored_job(store)
    if previous is not None:
        refuse_difference(store, previous["identity"], known)
        if store.exists(MANIFEST):
            return JobResult(store.url, _read_report(store), already_finished=True)
    timings = _Timings()
    observer.note("workers starting", count=prepared.workers, device=prepared.device)
    executor = start_workers(plan)
    try:
        timings.of_phase("start", timings.started)
        return _run(prepared, store, executor, known, observer, timings)
    finally:
        executor.close()


def _run(
    prepared: Prepared,
    store: Store,
    executor: Executor,
    known: dict[str, Any],
    observer: Observer,
    timings: _Timings,
) -> JobResult:
    plan = prepared.plan

    def work(phase: str, nodes: list[Node]) -> dict[str, dict[str, Any]]:
        start = time.perf_counter()
        observer.phase(phase, nodes)
        summaries = execute(nodes, executor, observer, timings)
        timings.of_phase(phase, start)
        return summaries

    sizes = {name: info.num_bytes for name, info in prepared.source.tensors.items()}
    surveyed = work("survey", survey_graph(sizes, executor.workers))
    hashes = {name: h for part in surveyed.values() for name, h in part["hashes"].items()}
    begin(store, prepared, with_content(known, hashes))

    keys = [block_key(block) for block in range(len(plan.blocks))]
    done = finished_keys(store, [*keys, OUTSIDE])
    observer.note("quantizing", blocks=len(keys), done=len(done & set(keys)))
    work("quantize", quantization_graph(plan, executor.workers, done))

    records = [read_record(store, key) for key in [*keys, OUTSIDE]]
    files = write_model(store, prepared, records)
    metrics = {}
    spec = prepared.spec.evaluation
    if spec is not None:
        variants = [*spec.baselines, "quantized"]
        measured = work("evaluate", evaluation_graph(spec, variants))
        metrics = {name: measured[f"evaluate/{name}"]["metrics"] for name in variants}
    report = make_report(prepared, records, metrics, timings.phases, timings.tasks)
    files[REPORT] = _put_report(store, report)
    commit(store, prepared.spec.name, files)
    observer.note("committed", store=store.url, files=len(files))
    return JobResult(store.url, report)


def execute(
    nodes: Sequence[Node], executor: Executor, observer: Observer, timings: _Timings | None = None
) -> dict[str, dict[str, Any]]:
    """Run a graph to its end; every task's summary. Raises the first error that ended it."""
    by_id = {node.id: node for node in nodes}
    scheduler = Scheduler(nodes, executor.workers)
    summaries: dict[str, dict[str, Any]] = {}
    event: Event = Started()
    failure: Exception | None = None
    while True:
        for instruction in scheduler.handle(event):
            match instruction:
                case Run(task, worker):
                    observer.submitted(by_id[task], worker)
                    executor.submit(worker, by_id[task])
                case Release(task):
                    executor.release(task)
                case Stop(complete):
                    if complete:
                        return summaries
                    assert failure is not None
                    raise failure
        result = executor.next_result()
        failure = result.error
        if failure is not None:
            lost = result.worker_lost
            event = WorkerLost(result.worker) if lost else Failed(result.task)
            continue
        summaries[result.task] = result.summary
        if timings is not None:
            timings.of_task(result)
        observer.finished(by_id[result.task], result)
        event = Finished(result.task)


def finished_keys(store: Store, keys: Sequence[str]) -> set[str]:
    """The keys that the ledger has a record for."""
    present = set(store.list("ledger/"))
    return {key for key in keys if record_name(key) in present}


def _put_report(store: Store, report: dict[str, Any]) -> dict[str, Any]:
    import hashlib

    data = dump(report)
    store.put(REPORT, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _read_report(store: Store) -> dict[str, Any]:
    import json

    try:
        report: dict[str, Any] = json.loads(store.get(REPORT))
    except ValueError:
        raise QuantfleetError(f"{store.url}/{REPORT} is not JSON") from None
    return report
