"""Workers as Ray actors. The only file that knows Ray.

Ray's own retries are off: what is repeated, and from where, is decided above. Results' parts stay
in Ray's object store as references; the driver passes them on and never looks inside.
"""

import logging
import math
import os
import time
import traceback
from typing import Any

from orchestrator.executors import Result
from orchestrator.graph import Node
from quantcore.errors import BY_NAME, ResourceError
from workers.plan import Plan
from workers.tasks import Task

_START_TIMEOUT_S = 180.0


class RayExecutor:
    """An embedded Ray on this machine, for the length of one job."""

    def __init__(
        self, plan: Plan, *, count: int, device: str, cpus: float, memory: int | None
    ) -> None:
        self._ray = ray = _ray_on_loopback()
        self.workers = count
        self._refs: dict[str, list[Any]] = {}
        self._running: dict[Any, tuple[int, Node, float]] = {}
        try:
            ray.init(
                address="local",
                num_cpus=max(1, math.ceil(count * cpus)),
                num_gpus=0 if device == "cpu" else count,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
        except Exception as error:
            raise ResourceError(f"Ray does not start on this machine: {error}") from None
        try:
            self._actors = self._start_workers(plan, device, cpus, memory)
        except BaseException:
            self.close()
            raise

    def _start_workers(self, plan: Plan, device: str, cpus: float, memory: int | None) -> list[Any]:
        ray = self._ray
        threads = str(plan.contract.threads)
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": 0 if device == "cpu" else 1,  # Ray counts Intel's GPUs as GPUs too
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        }
        if memory is not None:
            options["memory"] = memory
        actor = ray.remote(_Actor).options(**options)
        actors = [actor.remote() for _ in range(self.workers)]
        starts = [handle.start.remote(plan, device) for handle in actors]
        _, waiting = ray.wait(starts, num_returns=len(starts), timeout=_START_TIMEOUT_S)
        if waiting:
            raise ResourceError(
                f"{len(waiting)} of {len(starts)} workers did not start in "
                f"{_START_TIMEOUT_S:.0f} s; this Ray has {ray.available_resources()} free, and "
                f"each asks for {cpus:g} CPUs: lower workers.count, cpus or memory"
            )
        for start in starts:
            failure = ray.get(start)
            if failure is not None:
                raise _revived(failure)
        return actors

    def submit(self, worker: int, node: Node) -> None:
        inputs = [self._refs[task][part] for task, part in node.inputs]
        call = self._actors[worker].run.options(num_returns=1 + node.parts)
        refs = call.remote(node.task, node.parts, *inputs)
        first, *parts = refs if node.parts else [refs]
        self._refs[node.id] = parts
        self._running[first] = (worker, node, time.perf_counter())

    def next_result(self) -> Result:
        assert self._running
        done: list[Any] = []
        while not done:  # in short waits, so that an interrupt is heard
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=0.5)
        worker, node, start = self._running.pop(done[0])
        seconds = time.perf_counter() - start
        try:
            summary = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            loss = ResourceError(f"worker {worker} was lost in {node.id}: {_first_line(error)}")
            return Result(node.id, worker, seconds, error=loss, worker_lost=True)
        if "failure" in summary:
            return Result(node.id, worker, seconds, error=_revived(summary["failure"]))
        return Result(node.id, worker, seconds, summary)

    def release(self, task: str) -> None:
        del self._refs[task]

    def close(self) -> None:
        """End what `__init__` started: an embedded Ray goes with its driver's connection."""
        self._refs.clear()
        self._running.clear()
        self._ray.shutdown()


def _ray_on_loopback() -> Any:
    """Import Ray so that an embedded one listens on this machine alone and phones nowhere.

    Despite its name, the second variable decides on Linux too whether a node may be joined from
    outside; without that, every Ray server binds to 127.0.0.1. Ray's access token stays on, since
    other users of the machine can reach the loopback; only its notice is left out.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # this is the job that the user waits for
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray

    return ray


class _Actor:
    """The process around one Worker. Errors go back as plain facts: no pickled exceptions."""

    def __init__(self) -> None:
        self._worker: Any = None

    def start(self, plan: Plan, device: str) -> dict[str, str] | None:
        from workers.worker import Worker

        try:
            self._worker = Worker(plan, device)
        except Exception as error:
            return _described(error)
        return None

    def run(self, task: Task, parts: int, *inputs: Any) -> Any:
        try:
            outcome = self._worker.run(task, inputs)
            summary = outcome.summary
            results = outcome.parts
        except Exception as error:
            summary = {"failure": _described(error)}
            results = (None,) * parts
        assert len(results) == parts
        return (summary, *results) if parts else summary


def _described(error: Exception) -> dict[str, str]:
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def _revived(failure: dict[str, str]) -> Exception:
    """The error again, for the exit code it stands for; a bug of ours keeps its traceback."""
    kind = BY_NAME.get(failure["kind"])
    if kind is not None:
        return kind(failure["message"])
    return RuntimeError(f"a worker failed:\n{failure['trace']}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
