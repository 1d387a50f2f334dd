"""A job's figures as Prometheus metrics, through Ray's own exporter on every node of a cluster."""

from typing import Any

from orchestrator.executors import Result
from orchestrator.loop import Observer
from orchestrator.scheduler import Assignment
from workers.tasks import Round, Settle

_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300]


class RayMetrics(Observer):
    """`ray` is connected. Every metric carries the job's name."""

    def __init__(self, ray: Any, job: str) -> None:
        metrics = ray.util.metrics
        Counter, Gauge, Histogram = metrics.Counter, metrics.Gauge, metrics.Histogram
        keys = ("job",)
        of_task = (*keys, "kind", "shard")
        self._tasks = Counter("quantfleet_tasks", "Tasks finished.", of_task)
        self._seconds = Histogram(
            "quantfleet_task_seconds", "Seconds from dealt to done.", _SECONDS, of_task
        )
        self._blocks = Gauge("quantfleet_blocks_done", "Blocks published.", keys)
        self._total = Gauge("quantfleet_blocks", "Blocks of the model.", keys)
        self._workers = Gauge("quantfleet_workers", "Workers present.", keys)
        self._losses = Counter("quantfleet_workers_lost", "Workers lost.", keys)
        for metric in (self._tasks, self._seconds, self._blocks, self._total):
            metric.set_default_tags({"job": job})
        for metric in (self._workers, self._losses):
            metric.set_default_tags({"job": job})
        self._done = self._present = 0

    def finished(self, assignment: Assignment, result: Result) -> None:
        shard = "" if assignment.shard is None else str(assignment.shard)
        tags = {"kind": type(assignment.task).__name__, "shard": shard}
        self._tasks.inc(tags=tags)
        self._seconds.observe(max(result.seconds, 1e-6), tags=tags)
        if isinstance(assignment.task, Settle | Round):
            self._done += 1
            self._blocks.set(self._done)

    def note(self, event: str, **facts: Any) -> None:
        if event == "quantizing":
            self._done = facts["done"]
            self._blocks.set(self._done)
            self._total.set(facts["blocks"])
        elif event == "worker lost":
            self._losses.inc()
        if event in {"workers started", "worker joined", "worker lost"}:
            self._present = facts["present"]
            self._workers.set(self._present)
