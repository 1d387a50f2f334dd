"""`quantfleet plan`: what a fleet is asked to measure, and what is chosen from that.

    errors that the store lacks -> by workers of the first kind, block by block
    for each kind: whole models' divergence, with a held-out text (plan_checking.py)
                   times that the store lacks -> by its workers, a shape at a time -> choose
                   finalists' times end to end -> by one worker, if it has room (plan_proving.py)

Workers start where something is missing, and not else. What was measured stands in the store once
its task has ended, an error once its block has: whatever ends the command early, only what was
under way is measured again. Accelerators race at once. CPUs race one at a time: neighbours would
share their memory's bandwidth.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.bag import Bag
from orchestrator.checks import Prepared
from orchestrator.executors import Executor, Result
from orchestrator.loop import Observer, Observers, Summaries, Timings, execute
from orchestrator.plan_checking import Checker
from orchestrator.plan_proving import Prover
from orchestrator.scheduler import Assignment
from orchestrator.to_plan import Kind, ToPlan
from quantcore.autoquant.asking import layers
from quantcore.autoquant.choosing import Chooser
from quantcore.autoquant.document import Check, Plan
from quantcore.autoquant.finalists import EFFORT as END_TO_END
from quantcore.autoquant.finalists import Timed
from quantcore.autoquant.front import front
from quantcore.autoquant.measurements import HardwareKind, Measurements, Product, Timing, merged
from quantcore.autoquant.options import Layer
from quantcore.autoquant.race import Effort
from quantcore.autoquant.spots import Spot, contests, schemes_in, spot
from quantcore.errors import QuantizationError
from quantcore.schemes import Scheme
from workers import measured, sensed
from workers.store import STORE_PATIENCE_S, Store
from workers.tasks import Race, Sense, Task

StartWorkers = Callable[[Prepared], Executor]
Errors = Mapping[str, Mapping[Scheme, float]]  # by linear

_MOST_ROUNDS = 8  # of races: each asks only for what those before it left open


def measured_plans(
    job: ToPlan,
    start: StartWorkers,
    observer: Observer,
    effort: Effort,
    end_to_end: Effort = END_TO_END,
) -> Iterator[Plan]:
    """Each kind's, in their order. Raises the error tree's errors; what was measured is kept."""
    errors: Errors | None = None
    for kind in job.kinds:
        fleet = _Fleet(kind, start, observer)
        try:
            errors = errors or _errors(job, fleet)
            plan = _Planner(job, kind, fleet, effort, end_to_end).plan(errors)
        finally:
            fleet.close()
        yield plan


@dataclass(slots=True)
class _Fleet:
    """Workers of one kind, which start when they are first given something to do."""

    kind: Kind
    start: StartWorkers
    observer: Observer
    _executor: Executor | None = None

    def workers(self) -> int:
        return len(self.started().present())

    def started(self) -> Executor:
        if self._executor is None:
            devices = list(self.kind.prepared.team.devices)
            self.observer.note("workers starting", devices=devices)
            self._executor = self.start(self.kind.prepared)
        return self._executor

    def do(self, phase: str, tasks: Mapping[str, Task], *listening: Observer) -> Summaries:
        alone = phase == "race" and self.kind.device == "cpu"
        self.observer.phase(phase, len(tasks))
        observers = Observers(*listening, self.observer)
        return execute([Bag(tasks, alone=alone)], self.started(), observers, Timings())

    def ignored(self, line: str) -> None:
        """What the store has, and is no use."""
        self.observer.note("measurements ignored", why=line)

    def left_out(self, line: str) -> None:
        self.observer.note("left out", why=line)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close()


def _errors(job: ToPlan, fleet: _Fleet) -> Errors:
    """Of every linear under every scheme that some kind may give it."""
    wanted: dict[str, dict[Scheme, None]] = {}
    for kind in job.kinds:
        for family, offered in zip(job.families, kind.offered, strict=True):
            schemes = dict.fromkeys(schemes_in(offered))
            for linear in family.linears:
                wanted.setdefault(linear, {}).update(schemes)
    labels = {scheme.label(): scheme for of in wanted.values() for scheme in of}
    store = sensed.open_errors(job.spec.output.store, job.key, STORE_PATIENCE_S)
    known = sensed.known(store, labels, fleet.ignored)
    missing = {
        linear: tuple(scheme for scheme in of if scheme not in known.get(linear, {}))
        for linear, of in wanted.items()
    }
    missing = {linear: schemes for linear, schemes in missing.items() if schemes}
    if missing:
        fleet.do("sense", _sense_tasks(job, missing, fleet.workers()))
        sensed.tidy(store)
        known = sensed.known(store, labels, lambda _: None)
    return known


def _sense_tasks(
    job: ToPlan, missing: Mapping[str, tuple[Scheme, ...]], workers: int
) -> dict[str, Task]:
    """A run of blocks for each worker: who has a later one takes its texts through those before."""
    blocks = sorted({job.blocks[linear] for linear in missing})
    count = min(workers, len(blocks))
    cuts = [number * len(blocks) // count for number in range(count + 1)]
    return {
        f"sense/{number}": Sense(
            job.spec.output.store,
            job.key,
            tuple(blocks[first:last]),
            {of: missing[of] for of in missing if job.blocks[of] in blocks[first:last]},
        )
        for number, (first, last) in enumerate(itertools.pairwise(cuts))
    }


@dataclass(slots=True)
class _Keeper(Observer):
    """Writes times to the store as they come."""

    store: Store
    hardware: HardwareKind

    def finished(self, assignment: Assignment, result: Result) -> None:
        if new := result.summary.get("timings"):
            measured.keep(self.store, Measurements(of={self.hardware: new}))


@dataclass(slots=True)
class _Planner:
    """Of one kind of hardware."""

    job: ToPlan
    kind: Kind
    fleet: _Fleet
    effort: Effort
    end_to_end: Effort

    def plan(self, errors: Errors) -> Plan:
        job = self.job
        spots = [
            spot(family.linears, offered, errors, job.dtype, job.profile)
            for family, offered in zip(job.families, self.kind.offered, strict=True)
        ]
        checker = Checker(job, self.fleet.workers, partial(self.fleet.do, "check"))
        factors: dict[Scheme, float] = {}
        checks: list[Check] = []
        if job.held_out:
            factors, checks = checker.factors(spots)
        found = self._layers(spots, factors)
        outcome = Chooser(
            objective=job.spec.quantization.planning.least,
            budgets=job.budgets,
            confirm=partial(checker.confirm, spots=spots) if job.held_out else None,
            timed=self._timed(spots),
        ).chosen(found)
        ordered = tuple(sorted(outcome.layers, key=lambda layer: layer.name))
        return Plan(
            hardware=self.kind.hardware,
            profile=job.profile,
            choice=outcome.choice,
            front=front(ordered, job.budgets.num_bytes, outcome.choice.correction),
            checks=(*checks, *([outcome.check] if outcome.check else [])),
            ends=outcome.ends,
            factors=outcome.factors,
            measured=ordered,
            shapes={name: of for family in job.families for name, of in family.linears.items()},
        )

    def _timed(self, spots: Sequence[Spot]) -> Timed | None:
        stand = self.kind.stand
        if isinstance(stand, str):
            return None
        return Prover(
            job=self.job,
            hardware=self.kind.hardware,
            stand=stand,
            layers={of.name: of.linears for of in spots},
            effort=self.end_to_end,
            do=partial(self.fleet.do, "prove"),
            ignored=self.fleet.ignored,
            left_out=self.fleet.left_out,
        ).timed

    def _layers(self, spots: Sequence[Spot], factors: Mapping[Scheme, float]) -> list[Layer]:
        """To choose from, once all of them are timed."""
        store = measured.open_measurements(self.job.spec.output.store, STORE_PATIENCE_S)
        hardware = self.kind.hardware
        known = measured.known(store, hardware, self.fleet.ignored)
        for number in range(_MOST_ROUNDS):
            lacking = [
                these
                for these in contests(spots)
                if layers(these, factors, known, self.effort) is None
            ]
            if not lacking:
                found = layers(spots, factors, known, self.effort)
                assert found is not None
                if number:
                    measured.tidy(store)
                return found
            new = self._raced(lacking, factors, known, number, _Keeper(store, hardware))
            both = [Measurements(of={hardware: of}) for of in (known, new)]
            known = dict(merged(both).of[hardware])
        raise QuantizationError(
            "times came out otherwise each time they were measured: plan on a quiet machine"
        )

    def _raced(
        self,
        lacking: Sequence[tuple[Spot, ...]],
        factors: Mapping[Scheme, float],
        known: Mapping[Product, Timing],
        number: int,
        keeper: _Keeper,
    ) -> dict[Product, Timing]:
        tasks: dict[str, Task] = {}
        for these in lacking:
            shape = these[0].rows, these[0].columns
            of_shape = {p: t for p, t in known.items() if (p.rows, p.columns) == shape}
            name = f"race/{number}.{shape[0]}x{shape[1]}.{len(tasks)}"
            tasks[name] = Race(self.kind.hardware, these, factors, of_shape, self.effort)
        summaries = self.fleet.do("race", tasks, keeper)
        return {
            product: timing
            for summary in summaries.values()
            for product, timing in summary["timings"].items()
        }
