"""Choices and fronts beside exhaustive search and the whole program, both written anew here."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from quantcore.autoquant.choice import Budgets, Objective, choose
from quantcore.autoquant.front import front
from quantcore.autoquant.options import Layer, Option
from quantcore.autoquant.options import compared_us as compared
from quantcore.errors import SpecError
from tests.benchmarks.plan_choice import model
from tests.plans import LABELS, layer, option

Plan = tuple[Option, ...]


def costs(plan: Plan) -> tuple[float, float, float]:
    """Time, error and bytes; whole numbers in these tests, so sums are exact."""
    return (
        sum(of.time.time_us for of in plan),
        sum(of.error for of in plan),
        sum(of.num_bytes for of in plan),
    )


def every_plan(layers: Sequence[Layer]) -> Iterator[Plan]:
    return itertools.product(*(one.options for one in sorted(layers, key=lambda one: one.name)))


def fits(plan: Plan, budgets: Budgets) -> bool:
    limits = (budgets.time_us, budgets.error, budgets.num_bytes)
    return all(
        limit is None or cost <= limit for cost, limit in zip(costs(plan), limits, strict=True)
    )


def best(
    layers: Sequence[Layer], objective: Objective, budgets: Budgets
) -> tuple[float, ...] | None:
    """By exhaustive search, in the order in which ties are broken."""
    order = (0, 1, 2) if objective == "time" else (1, 0, 2)
    keys = [
        tuple(costs(plan)[at] for at in order) for plan in every_plan(layers) if fits(plan, budgets)
    ]
    return min(keys, default=None)


def _apart(draw: random.Random, count: int) -> list[float]:
    """Times of which no two tie."""
    return [1.03**step * draw.uniform(1, 1.004) for step in draw.sample(range(150), count)]


@st.composite
def problems(draw: st.DrawFn) -> list[Layer]:
    """Few and small numbers, so that there are ties, and budgets that are met to the last unit."""
    layers = []
    for number in range(draw(st.integers(1, 5))):
        labels = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=4, unique=True))
        options = [
            option(
                label,
                draw(st.integers(1, 12)),
                draw(st.integers(0, 9)),
                draw(st.sampled_from([0, 0, 1, 2, 5, 13, 1000])),
            )
            for label in labels
        ]
        layers.append(layer(f"l{number}", *options))
    return layers


@st.composite
def budgets_of(draw: st.DrawFn, layers: list[Layer]) -> Budgets:
    """Often just what some plan has: a budget on the edge."""
    plans = list(every_plan(layers))
    time_us, error, _ = costs(draw(st.sampled_from(plans)))
    num_bytes = costs(draw(st.sampled_from(plans)))[2]
    short = draw(st.sampled_from([0, 0, 0, 1]))
    return Budgets(
        time_us=draw(st.sampled_from([None, max(0, time_us - short)])),
        error=draw(st.sampled_from([None, max(0, error - short)])),
        num_bytes=draw(st.sampled_from([None, num_bytes])),
    )


@pytest.mark.parametrize("objective", ["time", "error"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_choice_equals_exhaustive_search(objective: Objective, data: st.DataObject) -> None:
    layers = data.draw(problems())
    budgets = data.draw(budgets_of(layers))
    expected = best(layers, objective, budgets)
    if expected is None:
        with pytest.raises(SpecError, match="budget of"):
            choose(layers, objective, budgets)
        return
    choice = choose(layers, objective, budgets)
    plan = tuple(chosen.option for chosen in choice.layers)
    time_us, error, num_bytes = costs(plan)
    assert fits(plan, budgets)
    found = (time_us, error, num_bytes) if objective == "time" else (error, time_us, num_bytes)
    assert found == expected
    assert (choice.totals.time_us, choice.totals.error, choice.totals.num_bytes) == costs(plan)


@pytest.mark.parametrize("objective", ["time", "error"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_choice_of_real_numbers_equals_exhaustive_search(objective: Objective, seed: int) -> None:
    draw = random.Random(seed)
    layers = [
        layer(
            f"l{number}",
            *(
                option(label, time_us, draw.randrange(10**9), draw.random() ** 9)
                for label, time_us in zip(LABELS, _apart(draw, 4), strict=False)
            ),
        )
        for number in range(5)
    ]
    edge = costs(draw.choice(list(every_plan(layers))))
    budgets = Budgets(
        time_us=edge[0] if objective == "error" else None,
        error=edge[1] if objective == "time" else None,
        num_bytes=edge[2] if draw.random() < 0.5 else None,
    )
    roomy = Budgets(
        **{name: limit * (1 + 1e-12) for name, limit in budgets.limits().items()}
    )  # sums of another order
    expected = best(layers, objective, roomy)
    assert expected is not None
    totals = choose(layers, objective, budgets).totals
    assert (totals.time_us if objective == "time" else totals.error) == pytest.approx(
        expected[0], rel=1e-9
    )


@pytest.mark.parametrize("objective", ["time", "error"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_uniform_plan_within_the_budgets_is_better(
    objective: Objective, data: st.DataObject
) -> None:
    layers = data.draw(problems())
    budgets = data.draw(budgets_of(layers))
    if best(layers, objective, budgets) is None:
        return
    choice = choose(layers, objective, budgets)
    by_name = {uniform.label: uniform for uniform in choice.uniforms}
    for label in LABELS:
        picks = []
        for one in sorted(layers, key=lambda one: one.name):
            offered = {of.label: of for of in one.options}
            picks.append(offered.get(label, offered.get("dense")))
        plan = tuple(of for of in picks if of is not None)
        offered_at_all = any(of.label == label for of in plan)
        assert (label in by_name) == (len(plan) == len(layers) and offered_at_all)
        if label not in by_name:
            continue
        uniform = by_name[label]
        assert (uniform.totals.time_us, uniform.totals.error) == costs(plan)[:2]
        assert uniform.fits == fits(plan, budgets)
        if uniform.fits and objective == "time":
            assert choice.totals.time_us <= uniform.totals.time_us
        elif uniform.fits:
            assert choice.totals.error <= uniform.totals.error


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_fine_front_is_that_of_exhaustive_search(data: st.DataObject) -> None:
    layers = data.draw(problems())
    points = [
        (point.totals.time_us, point.totals.error) for point in front(layers, resolution=1e-6)
    ]
    all_costs = {costs(plan)[:2] for plan in every_plan(layers)}
    undominated = {
        one
        for one in all_costs
        if not any(
            other != one and other[0] <= one[0] and other[1] <= one[1] for other in all_costs
        )
    }
    assert points == sorted(undominated, reverse=True)


def test_a_coarse_front_has_exact_points_no_more_than_a_step_apart_from_any_plan() -> None:
    draw = random.Random(3)
    layers = [
        layer(
            f"l{n}",
            *(option(label, draw.randrange(1, 99), 1, draw.randrange(999)) for label in LABELS),
        )
        for n in range(5)
    ]
    fine = [(of.totals.time_us, of.totals.error) for of in front(layers, resolution=1e-6)]
    coarse = [(of.totals.time_us, of.totals.error) for of in front(layers, resolution=1 / 4)]
    step = (fine[0][0] - fine[-1][0]) / 4
    assert len(coarse) <= 6 < len(fine)
    assert set(coarse) <= set(fine)
    assert coarse[-1] == fine[-1]
    for time_us, error in fine:
        assert any(t < time_us + step and e <= error for t, e in coarse)


@pytest.mark.parametrize("objective", ["time", "error"])
def test_a_choice_for_many_layers_equals_the_whole_program_given_to_the_solver(
    objective: Objective,
) -> None:
    layers = sorted(model(noise=0.0)[::3], key=lambda one: one.name)
    uniforms = {of.label: of.totals for of in choose(layers, "time", Budgets()).uniforms}
    coarse, fine = uniforms["int4 sym g64 triton_tiled"], uniforms["float8 channel triton_tiled"]
    budgets = Budgets(num_bytes=(coarse.num_bytes + fine.num_bytes) / 2)
    limit = (coarse.error * fine.error) ** 0.5
    if objective == "time":
        budgets = replace(budgets, error=limit)
    else:
        budgets = replace(budgets, time_us=(coarse.time_us + fine.time_us) / 2)

    options = [(at, of) for at, one in enumerate(layers) for of in one.options]
    compared_us = np.concatenate([compared(one.options) for one in layers])
    by_name = {
        "time_us": np.array([of.time.time_us for _, of in options]),
        "error": np.array([of.error for _, of in options]),
        "num_bytes": np.array([float(of.num_bytes) for _, of in options]),
    }
    one_each = np.array([[at == number for at, _ in options] for number in range(len(layers))])
    answer = milp(
        compared_us if objective == "time" else by_name["error"] * 1e4,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.astype(float), 1, 1),
            *(
                LinearConstraint(by_name[name] / most, -np.inf, 1)
                for name, most in budgets.limits().items()
            ),
        ],
        options={"mip_rel_gap": 0.0},
    )
    choice = choose(layers, objective, budgets)
    chosen = {of.layer: of.option for of in choice.layers}
    picked = [chosen[layers[at].name] is of for at, of in options]
    found = compared_us[picked].sum() if objective == "time" else choice.totals.error * 1e4
    assert found == pytest.approx(answer.fun, rel=1e-7)
    assert found > 0


@settings(max_examples=40, deadline=None)
@given(layers=problems(), noise=st.sampled_from([0.5, 1.0, 2.5]))
def test_with_noise_a_uniform_plan_is_faster_by_what_no_measurement_tells_apart_alone(
    layers: list[Layer], noise: float
) -> None:
    noisy = [
        replace(one, options=tuple(_with_noise(of, noise) for of in one.options)) for one in layers
    ]
    choice = choose(noisy, "time", Budgets())
    mine = {chosen.layer: chosen for chosen in choice.layers}
    for one in noisy:
        chosen = mine[one.name]
        fastest = min(one.options, key=lambda of: of.time.time_us)
        assert chosen.option.time.low_us <= fastest.time.high_us
        assert chosen.option == fastest or fastest.label in chosen.ties
        tied = [of for of in one.options if of.time.low_us <= fastest.time.high_us]
        assert chosen.option.error == min(of.error for of in tied)
    for uniform in choice.uniforms:
        assert choice.totals.time_us <= uniform.totals.time_us + 2 * noise * len(noisy)


def _with_noise(of: Option, noise: float) -> Option:
    return option(of.label, of.time.time_us, of.num_bytes, of.error, noise)
