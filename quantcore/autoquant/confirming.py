"""A plan that keeps its budget of error when the whole model is measured, not as predicted alone.

Each scheme's errors are scaled by what the model moves under this scheme alone (divergence.py), so
a uniform plan's are what was measured. Those of one that mixes schemes may add up to another sum:

    predicted = correction * sum of errors,   correction = 1 at first

Where a plan is measured to be over its budget, the correction is raised by how far, and it is
chosen again. That may rule out too much, as plans that mix less move the model less than it says.
So a faster one is looked for between the last correction that was too little and the first that
was enough, by halving (its logarithm); and uniform plans are compared by their own errors. Where
the error is to be least, they are compared by what was measured of both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantcore.autoquant.choice import (
    Budgets,
    Choice,
    Objective,
    choose,
    choose_as,
    ranked,
    uniform_labels,
)
from quantcore.autoquant.document import Check
from quantcore.autoquant.options import Layer
from quantcore.autoquant.program import keeps
from quantcore.errors import QuantizationError, SpecError

_MOST_CHOICES = 8
_MOST_HALVINGS = 3
_NEAR = 0.95  # of a budget: what is left of it is worth no more checks

Confirm = Callable[[Choice], Check]


def confirmed(
    layers: Sequence[Layer],
    objective: Objective,
    budgets: Budgets,
    confirm: Confirm,
    correction: float = 1.0,
) -> tuple[Choice, Check]:
    """The choice, with what was measured of it.

    Raises SpecError where no plan keeps the budgets, and QuantizationError where those that should
    keep them do not.
    """
    search = _Search(layers, objective, budgets, confirm)
    found, too_little, enough = search.corrected(correction)
    if too_little is not None:
        found = search.halved(found, too_little, enough)
    return search.least_error(found) if objective == "error" else found


def choose_beside(
    layers: Sequence[Layer], objective: Objective, budgets: Budgets, correction: float
) -> Choice:
    """By corrected errors; or a uniform plan, if by its own errors it is the better one."""
    if correction == 1.0:
        return choose(layers, objective, budgets)
    try:
        mixed = choose(layers, objective, budgets, correction)
    except SpecError:
        fitting = _fitting_uniforms(layers, choose(layers, objective, budgets))
        if not fitting:
            raise
    else:
        fitting = [mixed, *_fitting_uniforms(layers, mixed)]
    return min(fitting, key=lambda choice: ranked(layers, choice, choice.totals.error))


@dataclass(slots=True)
class _Search:
    layers: Sequence[Layer]
    objective: Objective
    budgets: Budgets
    confirm: Confirm
    uniforms: bool = True  # whether they are as good as their scheme's check said

    def corrected(self, correction: float) -> tuple[tuple[Choice, Check], float | None, float]:
        """What first keeps the budget; the last correction that was too little, and the first that
        was enough."""
        too_little = None
        for _ in range(_MOST_CHOICES):
            choice = self._chosen(correction)
            check = self.confirm(choice)
            if self._keeps(check):
                return (choice, check), too_little, correction
            if choice.totals.error == 0:
                break
            if choice.correction != correction:  # uniform, but for layers where its scheme lost
                self.uniforms = False
                continue
            too_little = correction
            correction *= max(1.01, check.measured / choice.totals.error)
        raise QuantizationError(
            f"budget of error: {self.budgets.error}: the last of {_MOST_CHOICES} plans that should "
            f"keep it was measured to move the model by {check.measured:.4g}: write more"
        )

    def halved(
        self, found: tuple[Choice, Check], too_little: float, enough: float
    ) -> tuple[Choice, Check]:
        """What is better than what was found, and keeps the budget still."""
        assert self.budgets.error is not None
        for _ in range(_MOST_HALVINGS):
            if found[1].measured >= _NEAR * self.budgets.error:
                break
            middle = math.sqrt(too_little * enough)
            choice = self._chosen(middle)
            if _labels(choice) == _labels(found[0]):
                enough = middle
                continue
            check = self.confirm(choice)
            if self._keeps(check):
                enough = middle
                found = min(found, (choice, check), key=self._rank)
            else:
                too_little = middle
        return found

    def least_error(self, found: tuple[Choice, Check]) -> tuple[Choice, Check]:
        for choice in _fitting_uniforms(self.layers, found[0]):
            if choice.totals.error < found[1].measured:
                check = self.confirm(choice)
                found = min(found, (choice, check), key=self._rank)
        return found

    def _chosen(self, correction: float) -> Choice:
        choosing = choose_beside if self.uniforms else choose
        return choosing(self.layers, self.objective, self.budgets, correction)

    def _keeps(self, check: Check) -> bool:
        return self.budgets.error is None or keeps(check.measured, self.budgets.error)

    def _rank(self, pair: tuple[Choice, Check]) -> tuple[float, ...]:
        return ranked(self.layers, pair[0], pair[1].measured)


def _fitting_uniforms(layers: Sequence[Layer], beside: Choice) -> list[Choice]:
    """Uniform plans that keep the budgets by their own errors."""
    return [
        choose_as(layers, beside.objective, beside.budgets, uniform_labels(layers, of.label))
        for of in beside.uniforms
        if of.fits
    ]


def _labels(choice: Choice) -> list[str]:
    return [layer.option.label for layer in choice.layers]
