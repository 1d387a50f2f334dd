"""Workers as Ray actors, on an embedded Ray or a cluster that is there.

Ray's own retries are off: what is repeated, and from where, is decided by the scheduler. Here a
lost worker is noticed, and another one is asked for in its place; when and where that one starts
is Ray's affair, and the job goes on meanwhile. Results' parts are where ray_parts.py has them; the
driver says from whom to whom, and never looks inside.
"""

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from orchestrator.executors import Arrival, Loss, News, Progress, Refusal, Result, unheard
from orchestrator.patience import Judge, OwnTime, Patience
from orchestrator.placement import freest, selectors
from orchestrator.ray_cluster import first_line
from orchestrator.ray_parts import Parts, stays
from orchestrator.ray_worker import NoRoomError, RayWorker
from orchestrator.scheduler import Assignment
from quantcore.errors import BY_NAME, ResourceError
from workers.kept import Near
from workers.plan import Plan

_LAST_WRITES_S = 15.0  # that a block which is being written is waited for at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The workers that a job asks for, and where it knows that it can have none."""

    devices: tuple[str, ...]  # of each worker
    cpus: float
    memory: int | None = None
    all_at_once: bool = True  # on this machine; a cluster's may come one by one
    start_timeout_s: float = 180.0  # for the first one, or for all
    settle_s: float = 20.0  # that the others are waited for once the first is there
    absence_s: float = 600.0  # without any worker until the job is given up
    patience: Patience = field(default_factory=Patience)
    refused: frozenset[str] = frozenset()  # nodes, by Ray's ids

    @property
    def count(self) -> int:
        return len(self.devices)

    def asks(self, device: str) -> dict[str, float]:
        """What a worker takes of a node, as Ray counts it: Intel's GPUs are GPUs too."""
        memory = {} if self.memory is None else {"memory": float(self.memory)}
        gpus = {} if device == "cpu" else {"GPU": 1.0}
        return {"CPU": self.cpus, **gpus, **memory}


@dataclass(slots=True)
class _Member:
    number: int
    actor: Any
    watch: Any  # a reference that becomes an error when the actor dies
    node: str
    device: str
    speed: float
    gpu: str = ""
    sees: tuple[str, ...] = ()
    pulse: Any = None  # asked for, and not answered yet
    asked: float = 0.0  # when it was asked for last
    asked_at: str = ""  # which assignment


@dataclass(slots=True)
class _Start:
    number: int
    actor: Any
    device: str
    target: str | None  # the node it was asked for on


@dataclass(slots=True)
class _Running:
    worker: int
    assignment: Assignment
    inputs: list[Any]
    start: float  # as the clock has it
    since: float  # in our own time

    def read_of(self) -> dict[str, int]:
        """Assignments whose makers' memory is read, and these makers."""
        read = zip(self.assignment.inputs, self.inputs, strict=True)
        return {source: given.maker for (source, _), given in read if isinstance(given, Near)}


class RayExecutor:
    """`ray` is a connection (ray_cluster.py), which ends with this executor."""

    def __init__(self, plan: Plan, wanted: Wanted, ray: Any) -> None:
        self._plan = plan
        self._wanted = wanted
        self.on_progress: Progress = unheard
        self._members: dict[int, _Member] = {}
        self._starting: dict[Any, _Start] = {}  # by the reference to their start
        self._hired = 0
        self._failed = 0  # starts since the last one that succeeded
        self._refused = set(wanted.refused)
        self._untold: list[News] = []
        self._sent: Any = None  # the plan, as workers are given it
        self._parts = Parts()
        self._running: dict[Any, _Running] = {}
        self._judge = Judge(plan, wanted.patience)
        self._time = OwnTime()
        self._looked = 0.0  # for workers that hang
        self._refusals: list[str] = []
        self._ray = ray
        try:
            self._assemble()
        except BaseException:
            self.close()
            raise

    def present(self) -> tuple[int, ...]:
        return tuple(self._members)

    def speed(self, worker: int) -> float:
        return self._members[worker].speed

    def submit(self, worker: int, assignment: Assignment) -> None:
        member = self._members[worker]
        inputs = [self._parts.input_for(member, source, part) for source, part in assignment.inputs]
        staying = assignment.id if assignment.parts and stays(member.device) else None
        sent = 0 if staying else assignment.parts
        call = member.actor.run.options(num_returns=1 + sent)
        refs = call.remote(assignment.task, assignment.parts, inputs, staying)
        first, *parts = refs if sent else [refs]
        if parts:
            self._parts.put(assignment.id, parts)
        now = time.perf_counter(), self._time.now()
        self._running[first] = _Running(worker, assignment, inputs, *now)

    def next_news(self) -> News:
        if self._untold:
            return self._untold.pop(0)
        absent_since = time.monotonic()
        while True:
            if self._members:
                absent_since = time.monotonic()
            self._refuse_absence(absent_since)
            watches = {member.watch: number for number, member in self._members.items()}
            waited = [*self._running, *self._starting, *watches]
            # in short waits, so that an interrupt is heard
            done, _ = self._ray.wait(waited, num_returns=1, timeout=0.5)
            self._take_pulses()
            if (hung := self._hung(done)) is not None:
                return self._lose(*hung)
            for ref in done:
                if ref in watches:
                    return self._lose(watches[ref], self._why(ref))
                if ref in self._running:
                    return self._end(ref)
                if (news := self._arrive(ref)) is not None:
                    return news

    def release(self, assignment: str) -> None:
        self._parts.release(assignment)

    def close(self) -> None:
        """End what we started: workers, and an embedded Ray with its driver's connection."""
        actors = [member.actor for member in self._members.values()]
        with contextlib.suppress(Exception):  # as below
            ends = [actor.close.options(concurrency_group="close").remote() for actor in actors]
            self._ray.wait(ends, num_returns=len(ends), timeout=_LAST_WRITES_S)
        for actor in [*actors, *(start.actor for start in self._starting.values())]:
            with contextlib.suppress(Exception):  # it may be gone, and Ray with it
                self._ray.kill(actor)
        self._parts.clear()
        self._running.clear()
        self._members.clear()
        self._starting.clear()
        self._ray.shutdown()

    def _hire(self, device: str) -> None:
        """Ask Ray for one more worker; `_arrive` hears when it is there."""
        wanted = self._wanted
        threads = str(self._plan.contract.threads)
        asks = wanted.asks(device)
        taken = Counter(member.node for member in self._members.values())
        taken.update(start.target for start in self._starting.values() if start.target)
        nodes = [node for node in self._ray.nodes() if node["NodeID"] not in self._refused]
        target = freest(nodes, asks, taken)
        options: dict[str, Any] = {
            "num_cpus": asks.pop("CPU"),
            "num_gpus": asks.pop("GPU", 0),
            **asks,
            "max_restarts": 0,
            "max_task_retries": 0,
            **selectors(target, self._refused),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        }
        # asked in a thread of its own, a worker answers while it works
        groups = {"pulse": 1, "watch": 1, "close": 1, "parts": 1}
        actor = self._ray.remote(concurrency_groups=groups)(RayWorker).options(**options).remote()
        if self._sent is None:
            self._sent = self._ray.put(self._plan)  # once, while there is room for it
        start = actor.start.remote(self._sent, device)
        self._starting[start] = _Start(self._hired, actor, device, target)
        self._hired += 1

    def _assemble(self) -> None:
        """Wait for the first workers: all of them here, as many as come soon on a cluster."""
        wanted = self._wanted
        for device in wanted.devices:
            self._hire(device)
        deadline = time.monotonic() + wanted.start_timeout_s
        while self._starting and time.monotonic() < deadline:
            done, _ = self._ray.wait(list(self._starting), num_returns=1, timeout=0.5)
            for ref in done:
                first = not self._members
                if isinstance(news := self._arrive(ref), Refusal):
                    self._untold.append(news)
                if first and self._members and not wanted.all_at_once:
                    deadline = min(deadline, time.monotonic() + wanted.settle_s)
        missing = wanted.count - len(self._members)
        if missing and (wanted.all_at_once or not self._members):
            refused = f" ({self._refusals[-1]})" if self._refusals else ""
            raise ResourceError(
                f"{missing} of {wanted.count} workers did not start in "
                f"{wanted.start_timeout_s:.0f} s{refused}; this Ray has "
                f"{self._ray.available_resources()} free, and each asks for {wanted.cpus:g} CPUs: "
                "lower workers.count, cpus or memory"
            )

    def _arrive(self, ref: Any) -> Arrival | Refusal | None:
        """Take in a worker whose start has ended, if it is to be."""
        start = self._starting.pop(ref)
        try:
            facts = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._refusals.append(first_line(error))
            self._hire_again(start.device)
            return None
        if "refused" in facts:
            return self._refuse(start, facts["node"], ResourceError(facts["refused"]))
        if "failure" in facts:
            told = _revived(facts["failure"])
            if not self._members:
                raise told
            # what is amiss there, a model that is not seen for one, is no reason to end here
            return self._refuse(start, facts["node"], told)
        self._failed = 0
        watch = start.actor.watch.options(concurrency_group="watch").remote()
        member = _Member(
            start.number,
            start.actor,
            watch,
            facts["node"],
            start.device,
            facts["speed"],
            facts["gpu"],
            tuple(facts["sees"]),
        )
        self._members[start.number] = member
        return Arrival(start.number)

    def _refuse(self, start: _Start, node: str, error: Exception) -> Refusal | None:
        """Have no workers on a node; the one asked for instead may wait until another comes."""
        self._ray.kill(start.actor)
        known_before = node in self._refused  # two may have started there at once
        self._refused.add(node)
        if not self._wanted.all_at_once:
            self._hire(start.device)
        if known_before:
            return None
        addresses = {known["NodeID"]: known["NodeManagerAddress"] for known in self._ray.nodes()}
        machine = f"node {addresses.get(node, node)}"
        self._refusals.append(f"{machine}: {error}")
        return Refusal(machine, error)

    def _hire_again(self, device: str) -> None:
        """Unless starts fail and fail: what ends one then ends the next one too."""
        self._failed += 1
        if self._failed <= 2 * self._wanted.count:
            self._hire(device)

    def _end(self, ref: Any) -> News:
        running = self._running[ref]
        worker, assignment = running.worker, running.assignment
        seconds = time.perf_counter() - running.start
        try:
            summary = self._ray.get(ref)
        except self._ray.exceptions.RayActorError:
            return self._lose(worker, self._why(ref))
        except self._ray.exceptions.RayError as error:  # its result found no room, for one
            del self._running[ref]
            self.release(assignment.id)
            failure = ResourceError(f"{assignment.id} on worker {worker}: {first_line(error)}")
            return Result(assignment.id, worker, seconds, error=failure)
        del self._running[ref]
        if "placed" in summary:
            self._parts.stay(assignment.id, self._members[worker], summary.pop("placed"))
        gone = {source for source, maker in running.read_of().items() if maker not in self._members}
        gone.update(assignment.inputs[number][0] for number in summary.get("missing", ()))
        if gone:  # a process that ended while its memory was read may have taken it along
            self.release(assignment.id)
            missing = tuple(sorted(gone))
            lost = ResourceError(f"{assignment.id} did not get its inputs from {missing}")
            return Result(assignment.id, worker, seconds, error=lost, missing=missing)
        if "failure" not in summary:
            self._parts.read(self._members[worker], running.inputs)
            self._judge.finished(assignment, seconds, self._members[worker].device)
            return Result(assignment.id, worker, seconds, summary)
        self.release(assignment.id)
        told = _revived(summary["failure"])
        if isinstance(told, ResourceError) and not isinstance(told, NoRoomError):
            return self._lose(worker, told)  # a fresh process, perhaps elsewhere, may have room
        return Result(assignment.id, worker, seconds, error=told)

    def _lose(self, worker: int, error: Exception) -> Loss:
        member = self._members.pop(worker)
        for ref, running in list(self._running.items()):
            if running.worker == worker:
                del self._running[ref]
                self.release(running.assignment.id)
        with contextlib.suppress(Exception):  # most often it is dead already
            self._ray.kill(member.actor)
        self._hire(member.device)
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        for other in self._members.values() if member.gpu else ():
            other.actor.forget.options(concurrency_group="parts").remote(worker)
        kept = not self._parts.lost(member) and member.node in alive
        return Loss(worker, error, parts_kept=kept)

    def _why(self, ref: Any) -> ResourceError:
        try:
            self._ray.get(ref, timeout=0)
        except Exception as error:
            return ResourceError(f"its process ended: {first_line(error)}")
        return ResourceError("its process ended")

    def _refuse_absence(self, since: float) -> None:
        silent = time.monotonic() - since > self._wanted.absence_s
        if not self._members and (silent or not self._starting):
            why = f": {self._refusals[-1]}" if self._refusals else ""
            raise ResourceError(f"no worker is left, and none came{why}")

    def _take_pulses(self) -> None:
        """Hand on what has been answered; ask again, each worker once at a time."""
        asked = {m.pulse: m for m in self._members.values() if m.pulse is not None}
        refs = list(asked)
        answered = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        for ref in answered:
            member = asked[ref]
            member.pulse = None
            with contextlib.suppress(self._ray.exceptions.RayError):  # its end is told elsewhere
                done, total = self._ray.get(ref)
                if total:
                    self.on_progress(member.asked_at, done, total)
        now = self._time.now()
        doing = self._doing()
        for number, member in self._members.items():
            due = now - member.asked >= self._wanted.patience.pulse_every_s
            if member.pulse is None and due:
                ask = member.actor.pulse.options(concurrency_group="pulse")
                member.pulse, member.asked = ask.remote(), now
                member.asked_at = doing[number].assignment.id if number in doing else ""

    def _hung(self, done: list[Any]) -> tuple[int, ResourceError] | None:
        """A worker that is to be given up, and why, if there is one."""
        now, doing = self._time.now(), self._doing()
        if now - self._looked < self._wanted.patience.pulse_every_s:
            return None
        self._looked = now
        heard = {self._running[ref].worker for ref in done if ref in self._running}
        for number, member in self._members.items():
            if number in heard:
                continue
            running, why = doing.get(number), None
            assignment = None if running is None else running.assignment
            if member.pulse is not None:
                why = self._judge.silent(assignment, now - member.asked)
            if why is None and running is not None:
                why = self._judge.slow(running.assignment, now - running.since, member.device)
            if why is not None:
                if running is not None:
                    self._judge.gave_up(running.assignment)
                return number, ResourceError(why)
        return None

    def _doing(self) -> dict[int, _Running]:
        return {running.worker: running for running in self._running.values()}


def _revived(failure: dict[str, str]) -> Exception:
    """The error again, for the exit code it stands for; a bug of ours keeps its traceback."""
    kinds: dict[str, type[Exception]] = {**BY_NAME, NoRoomError.__name__: NoRoomError}
    kind = kinds.get(failure["kind"])
    if kind is not None:
        return kind(failure["message"])
    return RuntimeError(f"a worker failed:\n{failure['trace']}")
