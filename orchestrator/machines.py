"""Which of the machines that are there a job can use, and how many workers they carry."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.spec import JobSpec
from quantcore.errors import Fault, ResourceError, SourceError
from workers.machine import Machine
from workers.plan import Plan

MOST_DEFAULT_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Chosen:
    """The device that a job computes on, its kind, and the machines that have it."""

    device: str
    kind: dict[str, str]
    machines: tuple[Machine, ...]

    @property
    def devices(self) -> int:
        return sum(machine.devices[self.device] for machine in self.machines)


def choose(machines: Sequence[Machine], wanted: str) -> Chosen:
    """The wanted device, or the fastest that is there; of several kinds the most frequent.

    One kind computes one job, because another may round other bits.
    """
    present = [d for d in ("cuda", "xpu", "cpu") if any(d in m.devices for m in machines)]
    if wanted != "auto" and wanted not in present:
        where = "on this machine; it has" if len(machines) == 1 else "in this cluster; it has"
        raise ResourceError(f"workers.kind: no {wanted} device {where}: {', '.join(present)}")
    device = present[0] if wanted == "auto" else wanted
    having = [machine for machine in machines if device in machine.devices]
    count = Counter[str]()
    for machine in having:
        count[repr(sorted(machine.kinds[device].items()))] += machine.devices[device]
    usual = count.most_common(1)[0][0]
    alike = tuple(m for m in having if repr(sorted(m.kinds[device].items())) == usual)
    return Chosen(device, alike[0].kinds[device], alike)


def worker_count(spec: JobSpec, plan: Plan, chosen: Chosen, need: int) -> tuple[int, list[Fault]]:
    """How many workers to start: what the job says, or what machines and job carry."""
    wanted = spec.workers
    faults = []
    allowed = wanted.memory_bytes()
    if allowed is not None and need > allowed:
        message = f"a worker is predicted to need {_gib(need)}: write memory: {_gib(need)}"
        faults.append(Fault(field="workers.memory", message=message, kind=ResourceError))
    most = plan.contract.chunks if plan.calibration is not None else len(plan.blocks)
    here = "this machine has" if len(chosen.machines) == 1 else "the machines have"
    free = max(machine.memory_free for machine in chosen.machines)
    room = sum(machine.memory_free // need for machine in chosen.machines)
    if room == 0:
        message = f"a worker needs {_gib(need)} and {here} {_gib(free)} free"
        faults.append(Fault(field="workers.memory", message=message, kind=ResourceError))
    if wanted.count is None:
        per_worker = wanted.threads if chosen.device == "cpu" else 1
        fitting = sum(m.devices[chosen.device] // per_worker for m in chosen.machines)
        return max(1, min(fitting, most, room, MOST_DEFAULT_WORKERS)), faults
    if chosen.device != "cpu" and wanted.count > chosen.devices:
        message = f"{here} {chosen.devices} {chosen.device} devices: write count: {chosen.devices}"
        faults.append(Fault(field="workers.count", message=message, kind=ResourceError))
    elif wanted.count > room > 0:
        message = (
            f"{wanted.count} workers of {_gib(need)} do not fit in the {_gib(free)} that are "
            f"free: write count: {room}"
        )
        faults.append(Fault(field="workers.count", message=message, kind=ResourceError))
    elif wanted.count > most:
        what = "calibration sequences" if plan.calibration else "blocks"
        message = f"only {most} workers can share these {what}: write count: {most}"
        faults.append(Fault(field="workers.count", message=message))
    return wanted.count, faults


def unshared(machines: Sequence[Machine], places: dict[str, str]) -> list[Fault]:
    """Paths that not every machine sees alike; `places` names the field of each path."""
    faults = []
    for path, field in places.items():
        first, *others = machines
        for other in others:
            if other.paths.get(path) == first.paths.get(path):
                continue
            what = "does not see" if other.paths.get(path) is None else "sees something else at"
            message = (
                f"{other.name} {what} {path}: on several machines a local path must be shared by "
                "all of them; put it on a shared file system, or use s3:// for a store"
            )
            faults.append(Fault(field=field, message=message, kind=SourceError))
            break
    return faults


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}GiB"
