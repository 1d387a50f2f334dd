"""Which of the machines that are there a job can use."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quantcore.errors import Fault, ResourceError, SourceError
from workers.machine import Machine

_FASTEST_FIRST = ("cuda", "xpu", "cpu")


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
    present = [d for d in _FASTEST_FIRST if any(d in m.devices for m in machines)]
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


def choose_fleet(machines: Sequence[Machine], wanted: str) -> tuple[Chosen, ...]:
    """What a job computes on: one kind, or with `mixed` every kind that there is, fastest first.

    In a mixed fleet a machine with accelerators gives those, and its cores are left to feed them.
    """
    if wanted != "mixed":
        return (choose(machines, wanted),)
    alike: dict[tuple[int, str], list[tuple[str, Machine]]] = {}
    for machine in machines:
        present = [device for device in _FASTEST_FIRST if device in machine.devices]
        for device in [d for d in present if d != "cpu"] or present:
            kind = repr(sorted(machine.kinds[device].items()))
            place = (_FASTEST_FIRST.index(device), kind)
            alike.setdefault(place, []).append((device, machine))
    return tuple(
        Chosen(members[0][0], members[0][1].kinds[members[0][0]], tuple(m for _, m in members))
        for _, members in sorted(alike.items(), key=lambda item: item[0])
    )


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
