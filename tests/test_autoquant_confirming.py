"""Plans that keep a budget of error when the whole model is measured, beside uniform ones."""

from collections.abc import Callable

import pytest

from quantcore.autoquant.choice import Budgets, Choice
from quantcore.autoquant.confirming import choose_beside, confirmed
from quantcore.autoquant.document import CHOSEN, Check
from quantcore.autoquant.options import Layer
from quantcore.errors import SpecError
from tests.plans import INT4, INT8, option

COUNT = 12
# In all: dense 12 x 8 = 96 us and no error; 8 bits 48 us and 0.12; 4 bits 24 us and 12
LAYERS = [
    Layer(
        name=f"a{number:02}",
        linears=(f"a{number:02}",),
        options=(
            option("dense", 8, 16, 0),
            option(INT8, 4, 8, 0.01),
            option(INT4, 2, 4, 0.5 + number / 11),
        ),
    )
    for number in range(COUNT)
]
Measure = Callable[[set[str], float], float]  # of a plan's labels and the sum of its errors


class Model:
    """What a plan moves it by, and how often it was asked."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.asked: list[float] = []

    def __call__(self, choice: Choice) -> Check:
        summed = sum(layer.option.error for layer in choice.layers)
        measured = self._measure({layer.option.label for layer in choice.layers}, summed)
        self.asked.append(measured)
        total = choice.totals.error
        return Check(plan=CHOSEN, summed=summed, predicted=total, measured=measured)


def more_with_int4(labels: set[str], summed: float) -> float:
    """Plans that mix 4 bits with others move the model by three times their sum, others by it."""
    return summed * (3 if INT4 in labels and len(labels) > 1 else 1)


def test_a_correction_for_mixed_plans_rules_out_no_uniform_plan_that_was_measured_to_fit() -> None:
    """At this budget no 4 bits fit, and 8 bits alone do, but not three times their error."""
    choice, check = confirmed(LAYERS, "time", Budgets(error=0.3), Model(more_with_int4))
    assert {layer.option.label for layer in choice.layers} == {INT8}
    assert (choice.totals.time_us, choice.correction) == (48, 1)
    assert check.measured == pytest.approx(0.12)
    fitting = {uniform.label: uniform.fits for uniform in choice.uniforms}
    assert fitting == {"dense": True, INT8: True, INT4: False}


@pytest.mark.parametrize("limit", [0.12, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 11.9, 12.0])
def test_no_uniform_plan_within_the_budget_is_faster(limit: float) -> None:
    model = Model(more_with_int4)
    choice, check = confirmed(LAYERS, "time", Budgets(error=limit), model)
    assert check.measured <= limit * (1 + 1e-9)
    uniforms = {INT4: (24, 12.0), INT8: (48, 0.12), "dense": (96, 0.0)}
    assert choice.totals.time_us <= min(t for t, error in uniforms.values() if error <= limit)
    assert len(model.asked) <= 8 + 3


def test_a_correction_that_was_too_much_is_halved() -> None:
    """Only plans with much of 4 bits move the model by more than their sum: fewer of them fit."""

    def measure(_labels: set[str], summed: float) -> float:
        return summed * (3 if summed > 2.5 else 1)

    choice, check = confirmed(LAYERS, "time", Budgets(error=3.0), Model(measure))
    # at three times the sum: one layer of 4 bits, 46 us; of its own sum of 2.5, three
    assert check.measured <= 3.0
    assert choice.totals.time_us <= 44


def test_where_no_mixed_plan_keeps_the_budget_the_best_uniform_one_is_taken() -> None:
    def measure(labels: set[str], summed: float) -> float:
        return 100.0 if len(labels) > 1 else summed

    choice, _ = confirmed(LAYERS, "time", Budgets(error=1.0), Model(measure))
    assert {layer.option.label for layer in choice.layers} == {INT8}
    within_bytes = Budgets(error=0.13, num_bytes=8 * COUNT)
    choice, _ = confirmed(LAYERS, "time", within_bytes, Model(measure))
    assert choice.totals.num_bytes == 8 * COUNT


def test_a_uniform_plan_that_is_measured_past_the_budget_is_not_insisted_on() -> None:
    """As where its scheme has lost the race of some layer, which stays dense."""

    def measure(labels: set[str], summed: float) -> float:
        return 3 * summed if labels != {INT8} else 0.31

    choice, check = confirmed(LAYERS, "time", Budgets(error=0.3), Model(measure))
    assert {layer.option.label for layer in choice.layers} == {INT8, "dense"}
    assert check.measured <= 0.3


def test_the_least_error_is_no_more_than_a_uniform_plan_was_measured_to_have() -> None:
    """Dense and 4 bits should have less error than 8 bits alone, and mixed move the model more."""
    options = (option("dense", 8, 16, 0), option(INT8, 5, 8, 0.1), option(INT4, 2, 4, 0.19))
    layers = [Layer(name=name, linears=(name,), options=options) for name in ("a", "b")]
    measured = Model(lambda labels, summed: summed * (1 if len(labels) == 1 else 3))
    choice, check = confirmed(layers, "error", Budgets(time_us=10), measured)
    assert {layer.option.label for layer in choice.layers} == {INT8}
    assert check.measured == pytest.approx(0.2)


def test_budgets_that_nothing_keeps_are_refused_before_a_model_is_measured() -> None:
    model = Model(more_with_int4)
    with pytest.raises(SpecError, match="budget of error: no plan within 100 bytes has"):
        confirmed(LAYERS, "time", Budgets(error=0.05, num_bytes=100), model)
    assert not model.asked
    with pytest.raises(SpecError, match="budget of error"):
        choose_beside(LAYERS, "time", Budgets(error=0.05, num_bytes=100), 3.0)
