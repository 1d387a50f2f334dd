"""Where a command runs its job: this process, a Ray of its own, or a cluster that is there."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checks import Look, Prepared, look_here
from orchestrator.executors import Executor, InProcessExecutor
from orchestrator.placement import of_another_kind
from quantcore.errors import SpecError
from workers.machine import Machine
from workers.plan import Plan


@dataclass(frozen=True, slots=True)
class Site:
    in_process: bool = False
    cluster: Any = None  # Ray, connected
    address: str = ""  # of the cluster
    seen: list[Machine] = field(default_factory=list)  # its nodes, as a check found them

    @property
    def look_at(self) -> Look:
        return look_here if self.cluster is None else self._look_at_nodes

    def start_workers(self, plan: Plan, prepared: Prepared) -> Executor:
        """The workers that a job was found to need. Raises ResourceError if they do not start."""
        if self.in_process:
            return InProcessExecutor(plan, prepared.team.devices)
        from orchestrator.ray_cluster import embedded
        from orchestrator.ray_executor import RayExecutor, Wanted

        workers = prepared.spec.workers
        count, cpus = prepared.workers, workers.cpus or float(workers.threads)
        wanted = Wanted(
            devices=prepared.team.devices,
            cpus=cpus,
            memory=workers.memory_bytes(),
            all_at_once=self.cluster is None,
            refused=of_another_kind(self.seen, prepared.device, plan.contract.kind),
        )
        if self.cluster is not None:
            return RayExecutor(plan, wanted, self._connected())
        gpus = sum(device != "cpu" for device in prepared.team.devices)
        store = prepared.admitted.object_store
        cpus_in_all = max(1, math.ceil(count * cpus))
        return RayExecutor(plan, wanted, embedded(cpus=cpus_in_all, gpus=gpus, object_store=store))

    def _connected(self) -> Any:
        """To the cluster, anew where workers before ended the connection with them."""
        from orchestrator.ray_cluster import joined

        return self.cluster if self.cluster.is_initialized() else joined(self.address)

    def _look_at_nodes(self, paths: Sequence[str]) -> list[Machine]:
        from orchestrator.ray_cluster import look_at_nodes

        self.seen[:] = look_at_nodes(self._connected(), paths)
        return self.seen


@contextlib.contextmanager
def open_site(address: str | None, in_process: bool) -> Iterator[Site]:
    """A connection to the cluster at `address`, or none; it is ended with the command."""
    if in_process or address is None:
        yield Site(in_process)
        return
    if "://" in address:
        raise SpecError(
            f"--address: {address} is reached from outside its cluster: use quantfleet submit; "
            "run needs a node of it, and HOST:PORT or auto"
        )
    from orchestrator.ray_cluster import joined

    ray = joined(address)
    try:
        yield Site(cluster=ray, address=address)
    finally:
        ray.shutdown()
