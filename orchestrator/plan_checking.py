"""Whole models beside plans' errors: what a scheme's are scaled by, and what a plan's are.

See quantcore/autoquant/divergence.py and confirming.py.

A worker with the whole model is asked for variants of it, each known by a digest of what its
linears take; what the store knows is not asked for.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.loop import Summaries
from orchestrator.to_plan import ToPlan
from quantcore.autoquant.choice import Choice
from quantcore.autoquant.costs import Spot
from quantcore.autoquant.document import CHOSEN, Check
from quantcore.schemes import Scheme
from workers import sensed
from workers.layout import dump
from workers.store import STORE_PATIENCE_S
from workers.tasks import Diverge, Task

Do = Callable[[Mapping[str, Task]], Summaries]


@dataclass(frozen=True, slots=True)
class Checker:
    job: ToPlan
    workers: Callable[[], int]
    do: Do

    def factors(self, spots: Sequence[Spot]) -> tuple[dict[Scheme, float], list[Check]]:
        """For each scheme, what its errors are scaled by, from the whole model under it alone."""
        schemes = {scheme: None for spot in spots for scheme in spot.errors}
        variants = {
            scheme: {name: scheme for of in spots if scheme in of.errors for name in of.linears}
            for scheme in schemes
        }
        found = self._measured(list(variants.values()))
        factors, checks = {}, []
        for scheme, measured in zip(variants, found, strict=True):
            summed = sum(spot.errors.get(scheme, 0.0) for spot in spots)
            if summed > 0:
                factors[scheme] = measured / summed
            label = scheme.label()
            checks.append(Check(plan=label, summed=summed, predicted=None, measured=measured))
        return factors, checks

    def check(self, choice: Choice, spots: Sequence[Spot]) -> Check:
        """The whole model under a choice."""
        (measured,) = self._measured([_schemes(choice)])
        return Check(
            plan=CHOSEN,
            summed=_summed(choice, spots),
            predicted=choice.totals.error,
            measured=measured,
        )

    def _measured(self, variants: Sequence[dict[str, Scheme]]) -> list[float]:
        job = self.job
        store = sensed.open_errors(job.spec.output.store, job.key, STORE_PATIENCE_S)
        digests = [_digest(job, variant) for variant in variants]
        known = sensed.known_divergences(store)
        missing = {d: v for d, v in zip(digests, variants, strict=True) if d not in known}
        if missing:
            self.do(_tasks(job, missing, self.workers()))
            sensed.tidy(store)
            known = sensed.known_divergences(store)
        return [known[digest] for digest in digests]


def _tasks(job: ToPlan, missing: dict[str, dict[str, Scheme]], workers: int) -> dict[str, Task]:
    """A run of variants for each worker, which loads the model once for them."""
    count = min(workers, len(missing))
    cuts = [number * len(missing) // count for number in range(count + 1)]
    pairs = list(missing.items())
    return {
        f"check/{number}": Diverge(
            job.spec.output.store, job.key, job.held_out, dict(pairs[first:last])
        )
        for number, (first, last) in enumerate(itertools.pairwise(cuts))
    }


def _digest(job: ToPlan, variant: Mapping[str, Scheme]) -> str:
    told = [[name, variant[name].label()] for name in sorted(variant)]
    return hashlib.sha256(dump([job.held_out, told])).hexdigest()[:16]


def _schemes(choice: Choice) -> dict[str, Scheme]:
    return {
        linear: layer.option.candidate.scheme
        for layer in choice.layers
        for linear in layer.linears
        if layer.option.candidate.scheme is not None
    }


def _summed(choice: Choice, spots: Sequence[Spot]) -> float:
    errors = {spot.name: spot.errors for spot in spots}
    schemes = {layer.layer: layer.option.candidate.scheme for layer in choice.layers}
    return sum(errors[name][scheme] for name, scheme in schemes.items() if scheme is not None)
