"""A fleet for plans: workers that compute on this CPU, whatever they are; times are made up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from orchestrator import plan_left
from orchestrator.checks import Prepared
from orchestrator.executors import Arrival, InProcessExecutor, Loss, News, Result
from orchestrator.loop import Observer
from orchestrator.plan_measuring import measured_plans
from orchestrator.scheduler import Assignment
from orchestrator.to_plan import ToPlan
from quantcore.autoquant.costs import measured
from quantcore.autoquant.document import Plan
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.timing import Bench
from quantcore.errors import ResourceError
from quantcore.schemes import Scheme
from workers.machine import Machine, look
from workers.tasks import Prove, Race, Sense

INT8_LINEAR, DYNAMIC = Scheme(name="int8"), Scheme(name="int8_dynamic")
EFFORT = Effort(seconds=0.02)
REST_US = 1e3
US = {"dense": 8.0, "int8": 4.0, "int8_dynamic": 2.0, "int4": 1.0}  # others 9
H200 = {"device": "cuda", "name": "NVIDIA H200", "torch": "2.11.0", "bfloat16": "native"}


class MadeUp(Bench):
    """Microseconds by scheme, for each row and token, the more on a CPU."""

    def __init__(self, times: float, us: Mapping[str, float] = US) -> None:
        super().__init__("cpu")
        self._times, self._us = times, us

    def stopwatch(self, product: Product) -> Stopwatch:
        scheme = product.candidate.scheme
        us = (
            self._times
            * self._us.get(scheme.name if scheme else "dense", 9.0)
            * product.rows
            * product.tokens
        )
        return lambda repeats: [us] * repeats


def whole_us(task: Prove, labels: Mapping[str, str], us: Mapping[str, float]) -> float:
    """What a whole model takes under a plan: its linears by scheme, and the rest of it."""
    taken = [label.split()[0] for layer, label in labels.items() for _ in task.layers[layer]]
    return REST_US + sum(us.get(scheme, 9.0) for scheme in taken)


class Fleet(InProcessExecutor):
    """Workers that compute on this CPU, whatever they are said to be, and make up times.

    By scheme: `alone` is what linears take in races, and `whole` what each does in a whole model.
    """

    alone: ClassVar[Mapping[str, float]] = US
    whole: ClassVar[Mapping[str, float] | None] = US  # None: they are run

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.plan, ["cpu"] * len(prepared.team.devices))
        self._races: list[tuple[int, Assignment]] = []

    def submit(self, worker: int, assignment: Assignment) -> None:
        made_up = Race if self.whole is None else Race | Prove
        if isinstance(assignment.task, made_up):
            self._races.append((worker, assignment))
        else:
            super().submit(worker, assignment)

    def next_news(self) -> News:
        if not self._races:
            return super().next_news()
        worker, assignment = self._races.pop(0)
        task = assignment.task
        if isinstance(task, Prove):
            assert self.whole is not None
            times = [whole_us(task, labels, self.whole) for labels in task.plans]
            ends = [Timing(median_us=us, low_us=us, high_us=us, repeats=8) for us in times]
            return Result(assignment.id, worker, 0.0, {"ends": ends})
        assert isinstance(task, Race)
        bench = MadeUp(1.0 if task.hardware.device == "cuda" else 10.0, self.alone)
        _, new = measured(task.spots, task.factors, task.known, bench, task.effort)
        return Result(assignment.id, worker, 0.0, {"timings": new})


class Lossy(Fleet):
    """Its first worker is lost with the first task of each kind; another one comes for it."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared)
        self._lost: set[str] = set()
        self._worker = 0
        self._anew: Any = None
        self._coming = False

    def submit(self, worker: int, assignment: Assignment) -> None:
        kind = assignment.id.partition("/")[0]
        if kind in self._lost:
            super().submit(worker, assignment)
        else:
            self._lost.add(kind)
            self._coming = True
            self._queue.clear()

    def next_news(self) -> News:
        if not self._coming:
            return super().next_news()
        if self._worker in self._workers:
            lost, self._worker = self._worker, self._worker + 1
            self._anew = self._workers.pop(lost)
            return Loss(lost, ResourceError("its process ended"))
        self._workers[self._worker] = self._anew
        self._coming = False
        return Arrival(self._worker)


class Asked(Observer):
    """What was asked of workers; dies once a task of that name is finished, or so far on."""

    def __init__(self, dies_at: str = "", progress: bool = False) -> None:
        self._dies_at, self._progress = dies_at, progress
        self.tasks: list[Any] = []

    def submitted(self, assignment: Assignment, worker: int) -> None:
        self.tasks.append(assignment.task)

    def progressed(self, assignment: Assignment, done: int, total: int) -> None:
        if self._progress:
            raise KeyboardInterrupt

    def finished(self, assignment: Assignment, result: Result) -> None:
        if self._dies_at and assignment.id.startswith(self._dies_at):
            raise KeyboardInterrupt

    def races(self) -> list[tuple[int, int]]:
        return [(t.spots[0].rows, t.spots[0].columns) for t in self.tasks if isinstance(t, Race)]

    def proven(self) -> list[Prove]:
        return [task for task in self.tasks if isinstance(task, Prove)]

    def sensed(self) -> list[int]:
        return [block for t in self.tasks if isinstance(t, Sense) for block in t.blocks]


def made(job: ToPlan, observer: Observer | None = None) -> list[Plan]:
    """Planned and left in the store."""
    plans = list(measured_plans(job, Fleet, observer or Observer(), EFFORT))
    for plan in plans:
        plan_left.leave(
            job, plan, str(Path(job.folder).parent.parent / f"{plan.hardware.name}.json")
        )
    return plans


def refuse_to_start(prepared: Prepared) -> Any:
    raise AssertionError("workers were started, and there was nothing to measure")


def mixed(paths: Sequence[str]) -> list[Machine]:
    """This machine, and one with an H200."""
    here = look(paths)
    kinds = {"cuda": H200, "cpu": here.kinds["cpu"]}
    free = {"cuda": (80 << 30,)}
    return [
        here,
        replace(here, name="other", kinds=kinds, devices={"cuda": 1, "cpu": 1}, device_free=free),
    ]


def two_cpus(paths: Sequence[str]) -> list[Machine]:
    """Two machines like this one; torch computes with fewer instructions on the other."""
    here = look(paths)
    fewer = {**here.kinds["cpu"], "instructions": "FEWER"}
    return [here, replace(here, name="other", kinds={"cpu": fewer})]
