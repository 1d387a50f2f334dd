"""A uniform plan stands where one of several schemes is as good, as far as measurements tell."""

from collections.abc import Sequence

import pytest

from quantcore.autoquant.choice import Budgets, Choice, Objective
from quantcore.autoquant.choosing import Chooser
from quantcore.autoquant.document import Check
from quantcore.autoquant.options import Layer
from tests.plans import layer, option

G64, G128 = "int4 sym g64 plain", "int4 sym g128 plain"
MIXED, ALL_G64, ALL_G128 = [G128, G64], [G64, G64], [G128, G128]


def two_layers(slower_us: float = 0.5, worse: float = 0.05) -> list[Layer]:
    """The small one is quicker in groups of 64, by so much, and the large one in groups of 128,
    whose errors are larger by so much."""
    return [
        layer("large", option(G64, 1030.0, 500, 1.0), option(G128, 1000.0, 480, 1 + worse)),
        layer("small", option(G64, 10.0, 5, 1.0), option(G128, 10.0 + slower_us, 4, 1 + worse)),
    ]


def labels_of(choice: Choice) -> list[str]:
    return [chosen.option.label for chosen in choice.layers]


def chosen(
    layers: Sequence[Layer],
    budgets: Budgets | None = None,
    objective: Objective = "time",
    measured: dict[str, float] | None = None,
) -> list[str]:
    """`measured`: what the whole model's check finds, by the labels of a plan."""

    def confirm(choice: Choice) -> Check:
        assert measured is not None
        labels = labels_of(choice)
        error = measured["mixed" if len(set(labels)) > 1 else labels[0]]
        return Check(plan="chosen", summed=error, predicted=None, measured=error)

    chooser = Chooser(
        objective=objective,
        budgets=budgets or Budgets(),
        confirm=None if measured is None else confirm,
        timed=None,
    )
    return labels_of(chooser.chosen(layers).choice)


def test_of_plans_that_are_as_quick_the_uniform_one_is_chosen() -> None:
    assert chosen(two_layers()) == ALL_G128


@pytest.mark.parametrize(
    "layers",
    [two_layers(slower_us=6.0), two_layers(worse=0.5)],
    ids=["slower", "worse"],
)
def test_a_plan_that_is_quicker_or_better_than_each_uniform_one_stays(layers: list[Layer]) -> None:
    assert chosen(layers) == MIXED


def test_a_uniform_plan_that_is_past_a_budget_is_not_chosen() -> None:
    assert chosen(two_layers(), Budgets(error=2.11)) == ALL_G128
    assert chosen(two_layers(), Budgets(error=2.06)) == MIXED
    assert chosen(two_layers(), Budgets(error=2.01)) == ALL_G64


def test_least_error_within_a_time_is_left_as_it_is() -> None:
    assert chosen(two_layers(), Budgets(time_us=1010.1), "error") == MIXED


def test_a_uniform_plan_that_the_whole_model_finds_worse_is_not_chosen() -> None:
    budgets = Budgets(error=2.2)
    fine = {"mixed": 2.0, G64: 2.0, G128: 2.0}
    assert chosen(two_layers(), budgets, measured=fine) == ALL_G128
    assert chosen(two_layers(), budgets, measured=fine | {G128: 2.3}) == MIXED


def test_what_another_run_measures_a_little_otherwise_changes_no_layer() -> None:
    """Without the rule the small layer changes sides, and with it all that are alike."""
    plans = {tuple(chosen(two_layers(slower_us=0.25 * step))) for step in range(-3, 4)}
    assert plans == {tuple(ALL_G128)}
