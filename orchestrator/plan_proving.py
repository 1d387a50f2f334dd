"""Finalists of a plan, run end to end by a worker that holds the whole model; what ran is kept.

See quantcore/autoquant/finalists.py. Those that take turns are one run, which the store knows by
all that it hangs on: hardware and software, the model, the calls, and which plans they are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Protocol

from orchestrator.executors import Result
from orchestrator.loop import Observer, Summaries
from orchestrator.plan_room import Stand
from orchestrator.scheduler import Assignment
from orchestrator.to_plan import ToPlan
from orchestrator.units import gib
from quantcore.autoquant.finalists import Finalist
from quantcore.autoquant.measurements import HardwareKind, Timing
from quantcore.autoquant.race import Effort
from workers import proven
from workers.layout import dump
from workers.store import STORE_PATIENCE_S, Store
from workers.tasks import Prove, Task

_VERSION = 2  # raised by hand whenever the same would be run otherwise


class Do(Protocol):
    """Have tasks done; whoever listens is told of each."""

    def __call__(self, tasks: Mapping[str, Task], *listening: Observer) -> Summaries: ...


@dataclass(slots=True)
class _Keeper(Observer):
    """Writes what a run's plans took to the store once it has ended."""

    store: Store
    digest: str
    hardware: HardwareKind
    plans: Sequence[str]  # digests

    def finished(self, assignment: Assignment, result: Result) -> None:
        if ends := result.summary.get("ends"):
            run = proven.Run(self.hardware.label(), dict(zip(self.plans, ends, strict=True)))
            proven.keep(self.store, self.digest, run)


@dataclass(frozen=True, slots=True)
class Prover:
    job: ToPlan
    hardware: HardwareKind
    stand: Stand
    layers: Mapping[str, tuple[str, ...]]  # their linears
    effort: Effort
    do: Do
    ignored: Callable[[str], None]
    left_out: Callable[[str], None]

    def timed(self, finalists: Sequence[Finalist]) -> list[Timing | None]:
        job = self.job
        store = proven.open_ends(job.spec.output.store, job.model_key, STORE_PATIENCE_S)
        known = proven.known(store, self.ignored)
        running = list(finalists)
        digest = self._digest(running)
        if digest not in known:
            running = self._fitting(finalists)
            digest = self._digest(running)
        if digest not in known:
            keeper = _Keeper(store, digest, self.hardware, list(map(_digest_of, running)))
            self.do({f"prove/{digest}": self._task(running)}, keeper)
            proven.tidy(store)
            known = proven.known(store, lambda _: None)
        plans = known[digest].plans
        return [plans.get(_digest_of(finalist)) for finalist in finalists]

    def _fitting(self, finalists: Sequence[Finalist]) -> list[Finalist]:
        """The first two, and of the others as many as there is room for."""
        fitting, left = [], self.stand.room
        for number, finalist in enumerate(finalists):
            left -= finalist.num_bytes
            if number > 1 and left < 0:
                names = ", ".join(of.plan for of in finalists[number:])
                self.left_out(
                    f"not run end to end: {names}: beside the others a worker has no room for "
                    f"{gib(finalist.num_bytes)} more"
                )
                break
            fitting.append(finalist)
        return fitting

    def _task(self, finalists: Sequence[Finalist]) -> Prove:
        return Prove(
            hardware=self.hardware,
            layers=self.layers,
            plans=tuple(finalist.labels for finalist in finalists),
            calls=self.job.profile.calls,
            cache_tokens=self.stand.cache_tokens,
            longest=self.stand.longest,
            effort=self.effort,
        )

    def _digest(self, finalists: Sequence[Finalist]) -> str:
        told = {
            "version": _VERSION,
            "hardware": asdict(self.hardware),
            "transformers": version("transformers"),
            "dtype": self.job.dtype,
            "calls": sorted(self.job.profile.calls.items()),
            "lengths": [self.stand.cache_tokens, self.stand.longest],
            "layers": self.layers,
            "plans": sorted(map(_digest_of, finalists)),
        }
        return _short(told)


def _digest_of(finalist: Finalist) -> str:
    return _short(finalist.labels)


def _short(told: object) -> str:
    return hashlib.sha256(dump(told)).hexdigest()[:16]
