"""The process around one Worker on a Ray cluster.

What goes back to the driver is plain: summaries, and errors as names and texts, never as pickled
exceptions. Inputs come as references and are read here, so that one that is lost is told apart
from a task that failed.
"""

import re
import threading
import time
import traceback
from typing import Any

import torch

from orchestrator.patience import FETCH_TIMEOUT_S
from orchestrator.ray_cluster import imported
from quantcore.errors import ResourceError
from workers.kept import Kept, Mapped, Near, Own
from workers.parcels import Lent, packed, size_of, unpacked
from workers.plan import BITS_VERSION, MIXED, Plan
from workers.tasks import Task


class RayWorker:
    """Each call but `run` goes to a thread of its own, so that it is answered during a task."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._progress = (0, 0)
        self._end = threading.Event()
        self._kept: Any = None  # parts that stay here
        self._mapped = Mapped()

    def start(self, plan: Plan, device: str) -> dict[str, Any]:
        """Where this worker is, or why there is none."""
        from workers.gpus import own_gpu, see_others, visible_gpus
        from workers.kind import hardware_kind
        from workers.worker import Worker

        facts: dict[str, Any] = {"node": imported().get_runtime_context().get_node_id()}
        try:
            see_others(device)
            if difference := _difference(plan, hardware_kind(device)):
                return {**facts, "refused": difference}
            self._worker = Worker(plan, device, self._tell)
            self._kept = Kept(self._worker.device)
        except Exception as error:
            return {**facts, "failure": described(error)}
        gpus = {"gpu": own_gpu(device), "sees": visible_gpus(device)}
        return {**facts, **gpus, "speed": self._worker.speed}

    def run(self, task: Task, parts: int, inputs: list[Any], staying: str | None = None) -> Any:
        """The summary, and the parts beside it; a summary may tell of a failure instead.

        Under the name `staying` parts are kept here, and the summary tells where.
        """
        try:
            start = time.perf_counter()
            given, missing = self._given(inputs)
            if missing:
                summary: dict[str, Any] = {"missing": missing}
                results: tuple[Any, ...] = (None,) * parts
            else:
                seconds = time.perf_counter() - start
                away = (n for n, one in enumerate(inputs) if not isinstance(one, Own))
                received = {"bytes": sum(size_of(given[n]) for n in away), "seconds": seconds}
                outcome = self._worker.run(task, given)
                summary = {**outcome.summary, "received": received}
                if staying is None:
                    results = tuple(packed(part) for part in outcome.parts)
                else:
                    summary["placed"] = self._kept.keep(staying, outcome.parts)
                    _finish(self._worker.device)  # before others read them
                    results = (None,) * parts
        except Exception as error:
            summary, results = {"failure": described(error)}, (None,) * parts
        finally:
            self._progress = (0, 0)
        assert len(results) == parts
        return (summary, *results) if parts and staying is None else summary

    def lend(self, slab: int) -> Lent:
        """Memory of this worker's, for another process of this machine."""
        told: Lent = self._kept.lend(slab)
        return told

    def send(self, assignment: str, part: int) -> Any:
        return self._kept.packed(assignment, part)

    def drop(self, assignment: str) -> None:
        self._kept.drop(assignment)

    def forget(self, maker: int) -> None:
        """Another process is no more."""
        self._mapped.forget(maker)

    def pulse(self) -> tuple[int, int]:
        return self._progress

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def watch(self) -> None:
        """Returns never: when this process dies, whoever waits for it is told."""
        self._end.wait()

    def _given(self, inputs: list[Any]) -> tuple[tuple[Any, ...], list[int]]:
        """Inputs on this worker's device, or the numbers of those that are lost."""
        asked: list[tuple[int, Any, int | None]] = []  # number, reference, slab
        for number, given in enumerate(inputs):
            if isinstance(given, Near):
                asked += [(number, ref, slab) for slab, ref in given.slabs.items()]
            elif not isinstance(given, Own):
                asked.append((number, given, None))
        fetched, missing = _fetched([ref for _, ref, _ in asked])
        if missing:
            return (), sorted({asked[place][0] for place in missing})
        found = dict[int, Any]()
        for (number, _, slab), value in zip(asked, fetched, strict=True):
            if slab is None:
                found[number] = value
            else:
                self._mapped.add(inputs[number].maker, slab, value)
        for number, given in enumerate(inputs):
            if isinstance(given, Own):
                found[number] = self._kept.part(given.assignment, given.part)
                continue
            there = self._mapped.part(given) if isinstance(given, Near) else found[number]
            found[number] = unpacked(there, self._worker.device)
        if any(isinstance(given, Near) for given in inputs):
            _finish(self._worker.device)  # all is copied before anyone is told that it was read
        missing = [number for number, value in found.items() if value is None]
        return tuple(found[number] for number in range(len(inputs))), sorted(missing)

    def _tell(self, done: int, total: int) -> None:
        self._progress = (done, total)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def described(error: Exception) -> dict[str, str]:
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def _difference(plan: Plan, kind: dict[str, str]) -> str | None:
    """In what this worker differs from what the job was planned for, if in anything."""
    contract = plan.contract
    if contract.bits_version != BITS_VERSION:
        return f"its quantfleet makes bits of version {BITS_VERSION}, not {contract.bits_version}"
    if contract.kind == MIXED:
        return None
    for field in sorted({*kind, *contract.kind}):
        here, planned = kind.get(field), contract.kind.get(field)
        if here != planned:
            return f"its {field} is {here}, and the job was planned for {planned}"
    return None


class NoRoomError(ResourceError):
    """Somebody's results were stored nowhere: whoever reads them next would meet that again."""


def _fetched(inputs: list[Any]) -> tuple[tuple[Any, ...], list[int]]:
    """The values of some references, or the numbers of those that are lost."""
    ray = imported()
    try:
        return tuple(ray.get(inputs, timeout=FETCH_TIMEOUT_S)), []
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        where = re.search(r"\bip=([^,)]+)", str(error))
        node = f"node {where[1]}" if where else "a node"
        raise NoRoomError(
            f"a task's results found no room on {node}: Ray's object store is full, and so is the "
            "disk that it spills to; free space there, or start it with more --object-store-memory"
        ) from None
    except (
        ray.exceptions.ObjectLostError,
        ray.exceptions.GetTimeoutError,
        ray.exceptions.RayActorError,  # that had it
    ) as error:
        missing = [number for number, ref in enumerate(inputs) if _is_lost(ref)]
        if missing or not isinstance(error, ray.exceptions.GetTimeoutError):
            return (), missing or [0]
        raise ResourceError(
            f"{len(inputs)} inputs did not fit together in this node's object store: start it "
            "with more --object-store-memory"
        ) from None


def _is_lost(ref: Any) -> bool:
    ray = imported()
    try:
        ray.get(ref, timeout=1.0)
    except (
        ray.exceptions.ObjectLostError,
        ray.exceptions.GetTimeoutError,
        ray.exceptions.RayActorError,
    ):
        return True
    return False
