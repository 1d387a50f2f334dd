"""A plan for one model, chosen until it holds: its error measured, then its time.

    1  choose by predictions, and again where the whole model moves by more than the budget of error
       (confirming.py); where a uniform plan is as good, as far as measurements tell, choose that:
       blocks that are alike change sides together, and another run would have it otherwise
    2  run finalists end to end (finalists.py), scale the times of kernels by what they took in the
       model, and choose again; what is chosen now runs as well, beside the fastest so far
    3  keep one of the finalists, whose error is measured too

Without held-out inputs nothing is corrected by errors, and without a way to run nothing by times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantcore.autoquant.choice import (
    Budgets,
    Choice,
    Objective,
    choose,
    choose_as,
    ranked,
    uniform_labels,
)
from quantcore.autoquant.confirming import Confirm, confirmed
from quantcore.autoquant.document import Check, End
from quantcore.autoquant.finalists import (
    Finalist,
    Timed,
    ends,
    factors,
    kept,
    near,
    scaled,
)
from quantcore.autoquant.measurements import Timing
from quantcore.autoquant.options import Layer
from quantcore.autoquant.program import keeps

PREDICTED, CORRECTED = "chosen by prediction", "chosen again"  # among the ends
# Of time and of error, what a plan of one scheme may have more than a plan of several
_AS_FAST, _AS_GOOD = 0.005, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    choice: Choice
    layers: Sequence[Layer]  # what was chosen from, times scaled
    check: Check | None
    ends: tuple[End, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    objective: Objective
    budgets: Budgets
    confirm: Confirm | None  # None: no held-out inputs
    timed: Timed | None  # None: nothing runs end to end

    def chosen(self, layers: Sequence[Layer]) -> Outcome:
        first = self._confirmed(layers, 1.0)
        return first if self.timed is None else self._proven(first, self.timed)

    def _confirmed(self, layers: Sequence[Layer], correction: float) -> Outcome:
        if self.confirm is None:
            choice = choose(layers, self.objective, self.budgets, correction)
            return self._simplest(Outcome(choice=choice, layers=layers, check=None))
        choice, check = confirmed(layers, self.objective, self.budgets, self.confirm, correction)
        return self._simplest(Outcome(choice=choice, layers=layers, check=check))

    def _simplest(self, outcome: Outcome) -> Outcome:
        """A uniform plan in the place of one that is hardly quicker, nor better; the best such."""
        mine = outcome.choice
        every = {of.label: uniform_labels(outcome.layers, of.label) for of in mine.uniforms}
        if self.objective != "time" or _labels(mine) in every.values():
            return outcome
        as_good = [
            choose_as(outcome.layers, self.objective, self.budgets, every[of.label])
            for of in mine.uniforms
            if of.fits
            and of.totals.time_us <= mine.totals.time_us * (1 + _AS_FAST)
            and of.totals.error <= mine.totals.error * (1 + _AS_GOOD)
        ]
        if not as_good:
            return outcome
        choice = min(as_good, key=lambda of: ranked(outcome.layers, of, of.totals.error))
        check = self.confirm(choice) if self.confirm else None
        limit = self.budgets.error
        if check is None or limit is None or keeps(check.measured, limit):
            return replace(outcome, choice=choice, check=check)
        return outcome

    def _proven(self, first: Outcome, timed: Timed) -> Outcome:
        candidates = near(_finalist(PREDICTED, first.choice), _uniforms(first))
        finalists, timings = _ran(candidates, timed)
        found = ends(finalists, timings, {})
        learned = factors(first.layers, finalists, found)
        again = self._confirmed(scaled(first.layers, learned), first.choice.correction)
        other = _finalist(CORRECTED, again.choice)
        if all(other.labels != of.labels for of in finalists):
            beside = kept(finalists, found)[0]
            rest_us = found[PREDICTED].predicted_us
            if rest_us is not None:
                rest_us += other.time_us - finalists[0].time_us
            found = ends(*_ran([other, beside], timed), found)
            found[CORRECTED] = replace(found[CORRECTED], predicted_us=rest_us)
            finalists = [other, *finalists]
        corrections = {PREDICTED: first.choice.correction, CORRECTED: again.choice.correction}
        for finalist in kept(finalists, found):
            correction = corrections.get(finalist.plan, 1.0)  # a uniform plan's errors are its own
            choice = choose_as(
                again.layers, self.objective, self.budgets, finalist.labels, correction
            )
            check = self.confirm(choice) if self.confirm else None
            limit = self.budgets.error
            if check is None or limit is None or keeps(check.measured, limit):
                found[finalist.plan] = replace(found[finalist.plan], kept=True)
                return replace(
                    again,
                    choice=choice,
                    check=check,
                    ends=tuple(found.values()),
                    factors=learned,
                )
        raise AssertionError("both that were chosen keep their budget, as was measured")


def _ran(finalists: Sequence[Finalist], timed: Timed) -> tuple[list[Finalist], list[Timing]]:
    pairs = zip(finalists, timed(finalists), strict=True)
    ran = [(finalist, timing) for finalist, timing in pairs if timing is not None]
    return [finalist for finalist, _ in ran], [timing for _, timing in ran]


def _finalist(plan: str, choice: Choice) -> Finalist:
    return Finalist(
        plan=plan,
        labels=_labels(choice),
        time_us=choice.totals.time_us,
        error=choice.totals.error,
        num_bytes=choice.totals.num_bytes,
    )


def _labels(choice: Choice) -> dict[str, str]:
    return {layer.layer: layer.option.label for layer in choice.layers}


def _uniforms(outcome: Outcome) -> list[Finalist]:
    return [
        Finalist(
            plan=uniform.label,
            labels=uniform_labels(outcome.layers, uniform.label),
            time_us=uniform.totals.time_us,
            error=uniform.totals.error,
            num_bytes=uniform.totals.num_bytes,
            fits=uniform.fits,
        )
        for uniform in outcome.choice.uniforms
    ]
