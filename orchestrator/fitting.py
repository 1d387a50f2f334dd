"""Whether a job fits on the machines that are there, and if not, what would.

A machine that is several Ray nodes counts once. Hidden states may wait on the device, on the host
or on disk: a job is refused only when it does not fit even with them on disk. No bit hangs on
where. A refusal tries smaller jobs, and names the first that fits.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from jobs.spec import JobSpec
from orchestrator.admission import Prediction, predict
from orchestrator.costs import Rates, block_seconds, rates_of
from orchestrator.holdings import Chunk, Pace
from orchestrator.keeping import Keeping
from orchestrator.machines import Chosen
from orchestrator.phases import Parts, Phases, peak
from orchestrator.sizes import Sizes
from orchestrator.units import GIB, MIB, gib
from quantcore.errors import Fault, ResourceError, StoreError
from workers.architecture import Architecture
from workers.capacity import Disk
from workers.machine import Machine
from workers.plan import Plan
from workers.shelf import places
from workers.sources import ModelSource

MOST_DEFAULT_WORKERS = 16
_RAY_AND_DRIVER = 3 * GIB // 2  # of a Ray that is still to be started
_DRIVER = GIB // 2
_LEAST_OBJECT_STORE = 512 * MIB
_LEAST_OF_RAY = 80 * MIB  # a store smaller than this it does not start
_MOST_OUTSIDE_SHARED_MEMORY = 9 * GIB  # more it keeps nowhere but in /dev/shm
_PART_OF_SHARED_MEMORY = 0.9

Spread = list[tuple[Machine, int]]  # how many workers on which machine


@dataclass(frozen=True, eq=False)
class Job:
    """What is to fit, and how it would be planned if its job file said something else."""

    spec: JobSpec
    plan: Plan
    architecture: Architecture
    source: ModelSource
    replan: Callable[[JobSpec], Plan]


@dataclass(frozen=True)
class Admitted:
    prediction: Prediction
    object_store: int | None  # bytes to give an embedded Ray; None where there is one
    notes: tuple[str, ...]  # what is slower than it might be, and why
    room: int  # host memory that one worker can have


class Admission:
    def __init__(self, job: Job, chosen: Chosen, store: Disk | None) -> None:
        self._job = job
        self._chosen = chosen
        self._store = store
        self._wanted = job.spec.workers
        self._embedded = all(machine.object_store is None for machine in chosen.machines)
        self._predict = cache(self._predicted)

    def admit(self) -> tuple[Admitted, list[Fault]]:
        """The prediction for the workers that there will be; why that cannot be."""
        wanted = self._wanted
        faults = list(self._miscounted())
        counts = [wanted.count] if wanted.count else list(range(self._most_workers(), 0, -1))
        found = self._fitting(counts) if not faults else None
        if found is not None:
            return self._admitted(found), []
        last = self._predict(counts[-1], places(self._chosen.device)[-1])
        if not faults:
            faults = list(self._faults(last))
        return self._admitted(last), faults

    def _predicted(self, workers: int, states_on: str, job: Job | None = None) -> Prediction:
        job = job or self._job
        sizes = Sizes(job.spec, job.plan, job.architecture, job.source, workers)
        rates = self._rates()
        keeps = keeps_states(sizes, rates) if job.plan.calibration else False
        return predict(sizes, states_on, rates, keeps=keeps)

    def _rates(self) -> Rates:
        spec, chosen = self._job.spec, self._chosen
        flops = chosen.machines[0].flops
        return rates_of(chosen.kind, spec.compute_dtype, spec.workers.threads, flops)

    def _fitting(self, counts: list[int], job: Job | None = None) -> Prediction | None:
        """The nearest place for hidden states, and with it the most workers, that fit."""
        calibrated = (job or self._job).plan.calibration is not None
        for place in places(self._chosen.device)[: None if calibrated else 1]:
            for count in counts:
                prediction = self._predict(count, place, job)
                if next(self._lacking(prediction), None) is None:
                    return prediction
        return None

    def _miscounted(self) -> Iterator[Fault]:
        """A number of workers that no memory would help."""
        count, chosen = self._wanted.count, self._chosen
        most = self._most_sharing()
        if count is None:
            return
        if chosen.device != "cpu" and count > chosen.devices:
            message = (
                f"{self._here()} {chosen.devices} {chosen.device} devices: "
                f"write count: {chosen.devices}"
            )
            yield Fault(field="workers.count", message=message, kind=ResourceError)
        elif count > most:
            what = "calibration sequences" if self._job.plan.calibration else "blocks"
            message = f"only {most} workers can share these {what}: write count: {most}"
            yield Fault(field="workers.count", message=message)

    def _most_sharing(self) -> int:
        plan = self._job.plan
        return plan.contract.chunks * plan.shards if plan.calibration else len(plan.blocks)

    def _most_workers(self) -> int:
        capacity = sum(self._capacity(machine) for machine in self._chosen.machines)
        return max(1, min(capacity, self._most_sharing(), MOST_DEFAULT_WORKERS))

    def _capacity(self, machine: Machine) -> int:
        wanted = self._wanted
        each = wanted.cpus or wanted.threads if self._chosen.device == "cpu" else 1
        return int(machine.devices[self._chosen.device] // each)

    def _here(self) -> str:
        return "this machine has" if len(self._chosen.machines) == 1 else "the machines have"

    def _spread(self, workers: int) -> Spread:
        """The machines with as many workers as Ray will start on each: evenly, where it can."""
        machines = self._chosen.machines
        counts = Counter[int]()
        for _ in range(workers):
            free = [i for i, m in enumerate(machines) if counts[i] < self._capacity(m)]
            counts[min(free or range(len(machines)), key=lambda i: counts[i])] += 1
        return [(machine, counts[i]) for i, machine in enumerate(machines) if counts[i]]

    def _faults(self, prediction: Prediction) -> Iterator[Fault]:
        """Each thing that is lacking, with what would do."""
        instead = self._instead()
        for fault in self._lacking(prediction):
            message = f"{fault.message}: {instead}" if instead else fault.message
            yield Fault(field=fault.field, message=message, kind=fault.kind)

    def _instead(self) -> str:
        """What the job file could say so that the job fits, the least change first."""
        wanted, spec = self._wanted, self._job.spec
        fewer = list(range((wanted.count or 1) - 1, 0, -1))
        if fewer and (fits := self._fitting(fewer)):
            return f"write count: {fits.workers}"
        calibration = spec.calibration
        counts = [wanted.count or 1, *fewer]
        for key in ("sequences", "length") if calibration is not None else ():
            assert calibration is not None
            value = getattr(calibration, key) // 2
            while value >= (8 if key == "sequences" else 128):
                smaller = spec.model_copy(
                    update={"calibration": calibration.model_copy(update={key: value})}
                )
                job = Job(
                    smaller,
                    self._job.replan(smaller),
                    self._job.architecture,
                    self._job.source,
                    self._job.replan,
                )
                if fits := self._fitting(counts, job):
                    count = "" if fits.workers == counts[0] else f", and count: {fits.workers}"
                    return f"write calibration.{key}: {value} or less{count}"
                value //= 2
        return ""

    def _lacking(self, prediction: Prediction) -> Iterator[Fault]:
        spread = self._spread(prediction.workers)
        yield from self._host_memory(prediction, spread)
        yield from self._device_memory(prediction, spread)
        yield from self._objects(prediction, spread)
        yield from self._disk(prediction, spread)

    def _host_memory(self, prediction: Prediction, spread: Spread) -> Iterator[Fault]:
        allowed = self._wanted.memory_bytes()
        if allowed is not None and prediction.host_bytes > allowed:
            need = f"{math.ceil(prediction.host_bytes / GIB * 10) / 10}GiB"
            message = f"a worker is predicted to need {need}: write memory: {need}"
            yield Fault(field="workers.memory", message=message, kind=ResourceError)
        by_host: dict[str, list[tuple[Machine, int]]] = {}
        for machine, workers in spread:
            by_host.setdefault(machine.host or machine.name, []).append((machine, workers))
        for members in by_host.values():
            workers = sum(count for _, count in members)
            free = min(machine.memory_free for machine, _ in members)
            objects = sum(self._objects_on(prediction, m, count) for m, count in members)
            beside = objects + self._overhead()
            total = workers * prediction.private_bytes + beside
            if total > free:
                name = "this machine" if self._embedded else members[0][0].name
                phase = peak(prediction.host)[0]
                message = (
                    f"{_workers(workers)} of {gib(prediction.private_bytes)} "
                    f"({_parts(prediction.host, phase)}) and {gib(beside)} beside them need "
                    f"{gib(total)} of memory, and {name} has {gib(free)} free"
                )
                field = "workers.count" if (self._wanted.count or 1) > 1 else "workers.memory"
                yield Fault(field=field, message=message, kind=ResourceError)

    def _device_memory(self, prediction: Prediction, spread: Spread) -> Iterator[Fault]:
        device = self._chosen.device
        for machine, workers in spread:
            free = sorted(machine.device_free.get(device, ()), reverse=True)[:workers]
            if free and min(free) < prediction.device_bytes:
                phase, need = peak(prediction.device)
                message = (
                    f"a worker needs {gib(need)} of a device's memory "
                    f"({_parts(prediction.device, phase)}), and {machine.name} has a {device} "
                    f"device with {gib(min(free))} free (a device with {gib(need)} would do)"
                )
                yield Fault(field="workers.kind", message=message, kind=ResourceError)
                return

    def _objects(self, prediction: Prediction, spread: Spread) -> Iterator[Fault]:
        """On a cluster, whose object stores are as large as they are."""
        for machine, workers in spread:
            if machine.object_store is None:
                continue
            need = prediction.objects * workers // prediction.workers + prediction.reading
            if need > machine.object_store:
                message = (
                    f"{_workers(workers)} on {machine.name} need {gib(need)} of Ray's object "
                    f"store, which has {gib(machine.object_store)}: start that node with "
                    f"--object-store-memory={need}"
                )
                yield Fault(field="workers.count", message=message, kind=ResourceError)

    def _disk(self, prediction: Prediction, spread: Spread) -> Iterator[Fault]:
        needs: dict[tuple[str, int], int] = {}
        store = self._store
        for machine, workers in spread:
            if machine.scratch is None:
                continue
            disk = machine.scratch
            place = (machine.host or machine.name, disk.device)
            needs[place] = needs.get(place, 0) + workers * sum(prediction.scratch.values())
            needs[place] += max(0, self._overflow(prediction, machine, workers))
            need = needs[place]
            if need > disk.free:
                message = (
                    f"{_workers(workers)} on {machine.name} need {gib(need)} for temporary files "
                    f"({_parts({'': prediction.scratch}, '')} each), and {gib(disk.free)} are "
                    "free: set TMPDIR to a folder with more"
                )
                yield Fault(field="workers", message=message, kind=ResourceError)
        artifact = sum(prediction.store.values())
        if store is not None:
            shared = needs.get((self._own_host(), store.device), 0)
            if artifact + shared > store.free:
                beside = f", beside {gib(shared)} of temporary files" if shared else ""
                message = (
                    f"the job will write {gib(artifact)} there "
                    f"({_parts({'': prediction.store}, '')}){beside}, and {gib(store.free)} are "
                    "free: make room, or name another store"
                )
                yield Fault(field="output.store", message=message, kind=StoreError)

    def _own_host(self) -> str:
        """Of the machine that sees the store: this one, where Ray is to be started."""
        first = self._chosen.machines[0]
        return first.host or first.name

    def _objects_on(self, prediction: Prediction, machine: Machine, workers: int) -> int:
        """Bytes of objects that one machine's memory holds."""
        here = sum(prediction.object_store.values()) * workers // prediction.workers
        return min(here + prediction.reading, self._store_of(prediction, machine))

    def _overhead(self) -> int:
        return _RAY_AND_DRIVER if self._embedded else _DRIVER

    def _store_of(self, prediction: Prediction, machine: Machine) -> int:
        if machine.object_store is not None:
            return machine.object_store
        return object_store_size(prediction, machine)

    def _overflow(self, prediction: Prediction, machine: Machine, workers: int) -> int:
        """What Ray will write to disk because its store is full."""
        here = sum(prediction.object_store.values()) * workers // prediction.workers
        return here - self._store_of(prediction, machine)

    def _admitted(self, prediction: Prediction) -> Admitted:
        spread = self._spread(prediction.workers)
        notes = []
        if prediction.states_on != places(self._chosen.device)[0]:
            notes.append(f"hidden states wait on the {prediction.states_on}: memory is short")
        full = [m for m, count in spread if self._overflow(prediction, m, count) > 0]
        if full:
            size = gib(min(self._store_of(prediction, machine) for machine in full))
            notes.append(f"Ray keeps {size} of objects in memory and writes more of them to disk")
        first = self._chosen.machines[0]
        size_of_store = object_store_size(prediction, first) if self._embedded else None
        room = min(
            (m.memory_free - self._objects_on(prediction, m, count) - self._overhead()) // count
            for m, count in spread
        )
        return Admitted(prediction, size_of_store, tuple(notes), room)


def object_store_size(prediction: Prediction, machine: Machine) -> int:
    """What to give an embedded Ray: twice what is predicted, as far as /dev/shm has room."""
    wanted = max(2 * sum(prediction.object_store.values()), _LEAST_OBJECT_STORE)
    shared = machine.shared_free
    if shared is None or shared * _PART_OF_SHARED_MEMORY < _LEAST_OF_RAY:
        return min(wanted, _MOST_OUTSIDE_SHARED_MEMORY)  # Ray then keeps it in a temporary folder
    return min(wanted, int(shared * _PART_OF_SHARED_MEMORY))


def keeps_states(sizes: Sizes, rates: Rates) -> bool:
    """Whether hidden states will be kept in the store, at the pace that is predicted."""
    plan = sizes.plan
    for _, last in plan.shard_ranges():
        index = last - 1
        each = block_seconds(sizes, rates, index)
        chunks = -(-plan.contract.chunks // sizes.hands)
        pace = Pace({"Collect": each["collect"] / chunks, "Advance": each["advance"] / chunks})
        losses = sizes.spec.workers.losses_per_day
        keeping = Keeping(plan.contract.chunks, sizes.chunk, losses)
        keeping.consider(index, [pace] * sizes.hands)
        if keeping.due([Chunk(0, 0, index)])[1]:
            return True
    return False


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"


def _parts(phases: Phases, phase: str) -> str:
    parts: Parts = phases[phase]
    largest = sorted(parts, key=lambda part: -parts[part])[:3]
    told = ", ".join(f"{part} {gib(parts[part])}" for part in largest)
    return f"{phase}: {told}" if phase else told
