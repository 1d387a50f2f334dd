"""The choice of candidates beside exhaustive search, which is written anew here."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.choice import Budgets, Objective, choose
from quantcore.autoquant.front import front, within
from quantcore.autoquant.options import Layer, Option, Time, noise
from quantcore.errors import SpecError
from tests.benchmarks.plan_choice import model

LABELS = (
    "dense",
    "float8 channel plain",
    "int4 sym g128 plain",
    "int4 sym g64 plain",
    "int8 sym channel plain",
)
Plan = tuple[Option, ...]


def option(label: str, time_us: float, num_bytes: int, error: float, noise: float = 0.0) -> Option:
    time = Time(time_us=time_us, low_us=max(0.0, time_us - noise), high_us=time_us + noise)
    return Option(candidate=candidate_of(label), time=time, num_bytes=num_bytes, error=error)


def layer(name: str, *options: Option) -> Layer:
    return Layer(name=name, linears=(name,), options=options)


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
                option(label, draw.uniform(1, 99), draw.randrange(10**9), draw.random() ** 9)
                for label in LABELS[:4]
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


def test_between_two_uniform_budgets_the_choice_beats_every_uniform_plan() -> None:
    layers = model(noise=0.0)[::8]
    uniforms = {
        uniform.label: uniform.totals for uniform in choose(layers, "time", Budgets()).uniforms
    }
    coarse = uniforms["int4 sym g128 triton_tiled"].error
    fine = uniforms["int8 sym channel triton_tiled"].error
    choice = choose(layers, "time", Budgets(error=(coarse * fine) ** 0.5))
    fitting = [uniform.totals.time_us for uniform in choice.uniforms if uniform.fits]
    assert choice.totals.time_us < 0.95 * min(fitting)


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


def test_another_budget_is_looked_up_on_the_front() -> None:
    layers = model(noise=0.0)[::16]
    points = front(layers)
    errors = [point.totals.error for point in points]
    assert errors == sorted(errors)
    found = within(points, Budgets(error=errors[5]))
    assert found is not None
    assert found == points[5]
    assert found.totals.time_us == pytest.approx(
        choose(layers, "time", Budgets(error=errors[5])).totals.time_us
    )
    assert within(points, Budgets(time_us=points[-1].totals.time_us / 2)) is None
    assert front(layers, num_bytes=1) == ()


def test_layers_that_share_a_choice_take_one_that_all_of_them_have() -> None:
    one = layer("q", option("dense", 9, 9, 0), option("int8 sym channel plain", 1, 4, 1))
    other = layer(
        "k",
        option("dense", 9, 9, 0),
        option("int8 sym channel plain", 20, 4, 1),
        option("int4 sym g64 plain", 1, 2, 3),
    )
    joined = Layer.joined("qk", [one, other])
    assert joined.linears == ("q", "k")
    assert [of.label for of in joined.options] == ["dense", "int8 sym channel plain"]
    choice = choose([joined], "time", Budgets())
    assert [of.option.label for of in choice.layers] == ["dense"]
    assert choice.totals.time_us == 18
    apart = choose([one, other], "time", Budgets())
    assert [of.option.label for of in apart.layers] == [
        "int4 sym g64 plain",
        "int8 sym channel plain",
    ]
    with pytest.raises(SpecError, match=r"'qk': no candidate is legal for all of q, k"):
        Layer.joined("qk", [one, layer("k", option("int4 sym g64 plain", 1, 2, 3))])


def test_ties_within_the_noise_are_broken_by_error_bytes_and_label_and_told() -> None:
    tied = layer(
        "a",
        option("int8 sym channel plain", 10.0, 5, 2.0, noise=0.5),
        option("int4 sym g64 plain", 10.4, 5, 1.0, noise=0.5),
        option("int4 sym g128 plain", 10.8, 4, 1.0, noise=0.5),
        option("float8 channel plain", 11.4, 1, 0.5, noise=0.5),
        option("dense", 30.0, 9, 0.0, noise=0.5),
    )
    (chosen,) = choose([tied], "time", Budgets()).layers
    assert chosen.option.label == "int4 sym g128 plain"
    assert chosen.ties == ("float8 channel plain", "int4 sym g64 plain", "int8 sym channel plain")
    assert chosen.runner_up is not None
    assert chosen.runner_up.label == "int4 sym g64 plain"
    assert chosen.runner_up.more_us == pytest.approx(-0.4)
    assert chosen.runner_up.more_bytes == 1
    twins = [option(label, 1, 1, 1) for label in ("int8 sym channel plain", "int4 sym g64 plain")]
    (chosen,) = choose([layer("a", *twins)], "time", Budgets()).layers
    assert chosen.option.label == "int4 sym g64 plain"


def test_the_order_in_which_layers_and_options_come_decides_nothing() -> None:
    draw = random.Random(0)
    layers = [
        layer(f"l{n}", *(option(label, at + 1, 1, 5 - at) for at, label in enumerate(LABELS)))
        for n in range(6)
    ]
    expected = choose(layers, "time", Budgets(error=17))
    labels = [chosen.option.label for chosen in expected.layers]
    assert labels == sorted(labels), "of equals the first name takes the first label"
    for _ in range(3):
        shuffled = [replace(one, options=tuple(draw.sample(one.options, 5))) for one in layers]
        draw.shuffle(shuffled)
        again = choose(shuffled, "time", Budgets(error=17))
        assert again == expected


def test_two_noisy_runs_differ_by_ties_alone() -> None:
    """Times drawn anew within one per cent, intervals as wide: what differs was said to tie."""
    draw = random.Random(1)
    layers = model(noise=0.02)[::4]

    def measured_anew() -> list[Layer]:
        factors = {of.label: draw.uniform(0.99, 1.01) for of in layers[0].options}
        return [
            replace(
                one,
                options=tuple(
                    replace(
                        of,
                        time=Time(
                            time_us=of.time.time_us * factors[of.label],
                            low_us=of.time.low_us * factors[of.label],
                            high_us=of.time.high_us * factors[of.label],
                        ),
                    )
                    for of in one.options
                ),
            )
            for one in layers
        ]

    one, other = (choose(measured_anew(), "time", Budgets()).layers for _ in range(2))
    for mine, theirs in zip(one, other, strict=True):
        assert theirs.option.label in (mine.option.label, *mine.ties)


def test_the_runner_up_is_one_that_keeps_the_budgets() -> None:
    only = layer(
        "a",
        option("int4 sym g64 plain", 1, 1, 100),
        option("int8 sym channel plain", 5, 2, 10),
        option("dense", 9, 4, 0),
    )
    (chosen,) = choose([only], "time", Budgets(error=10)).layers
    assert chosen.option.label == "int8 sym channel plain"
    assert chosen.runner_up is not None
    assert (chosen.runner_up.label, chosen.runner_up.more_us) == ("dense", 4)
    (chosen,) = choose([only], "time", Budgets(error=10, num_bytes=2)).layers
    assert chosen.runner_up is None


def test_a_budget_that_cannot_be_kept_is_named_with_the_least_that_can_be_had() -> None:
    two = [
        layer(name, option("dense", 8, 16, 0), option("int4 sym g64 plain", 2, 4, 3))
        for name in ("a", "b")
    ]
    with pytest.raises(SpecError, match=r"budget of bytes: no plan has 7 or less: write 8 or more"):
        choose(two, "time", Budgets(num_bytes=7))
    with pytest.raises(
        SpecError, match=r"budget of error: no plan within 20 bytes has 2 or less: write 3 or more"
    ):
        choose(two, "time", Budgets(num_bytes=20, error=2))
    with pytest.raises(
        SpecError, match=r"microseconds: no plan within 3 error has 9 or less: write 10 or more"
    ):
        choose(two, "error", Budgets(error=3, time_us=9))
    assert choose(two, "time", Budgets(num_bytes=20, error=3)).totals.time_us == 10


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_least_that_a_refusal_names_is_a_budget_that_can_be_kept(seed: int) -> None:
    draw = random.Random(seed)
    options = [
        option(label, draw.uniform(1, 9), draw.randrange(10**10), draw.random() ** 20)
        for label in LABELS
    ]
    layers = [layer("a", *options[:3]), layer("b", *options[3:])]
    for name in ("num_bytes", "error", "time_us"):
        with pytest.raises(SpecError) as told:
            choose(layers, "time", Budgets(**{name: 1e-300}))
        least = float(str(told.value).split("write ")[1].split(" or more")[0])
        totals = choose(layers, "time", Budgets(**{name: least})).totals
        assert getattr(totals, name) == pytest.approx(least, rel=1e-4)


def test_the_correction_for_the_whole_model_counts_in_budgets_and_totals() -> None:
    two = layer("a", option("dense", 8, 16, 0), option("int4 sym g64 plain", 2, 4, 3))
    assert choose([two], "time", Budgets(error=6), correction=2.0).totals.error == 6
    assert choose([two], "time", Budgets(error=5.9), correction=2.0).totals.error == 0


@pytest.mark.parametrize(
    ("limit", "message"), [(-1.0, "write a number from 0"), (float("nan"), "write a number")]
)
def test_a_budget_that_is_no_amount_is_refused(limit: float, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Budgets(error=limit)


def test_costs_that_are_no_amounts_are_refused() -> None:
    for bad in (option("dense", 1, 1, float("nan")), option("dense", 1, -1, 0)):
        with pytest.raises(SpecError, match="'a': dense: times, bytes and error must be finite"):
            layer("a", bad)
    with pytest.raises(SpecError, match="stands twice"):
        layer("a", option("dense", 1, 1, 0), option("dense", 2, 1, 0))
    with pytest.raises(SpecError, match="nothing to choose from"):
        layer("a")
    with pytest.raises(SpecError, match="layers:"):
        choose([], "time", Budgets())


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
    by_name = {
        "time_us": np.array([of.time.time_us for _, of in options]),
        "error": np.array([of.error for _, of in options]),
        "num_bytes": np.array([float(of.num_bytes) for _, of in options]),
    }
    one_each = np.array([[at == number for at, _ in options] for number in range(len(layers))])
    answer = milp(
        by_name["time_us" if objective == "time" else "error"]
        * (1 if objective == "time" else 1e4),
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
    totals = choose(layers, objective, budgets).totals
    found = totals.time_us if objective == "time" else totals.error * 1e4
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


def test_noise_is_told_where_most_candidates_tie_by_it() -> None:
    def noisy(name: str, by: float) -> Layer:
        labels = ("dense", "int8 sym channel plain", "int4 sym g64 plain")
        return layer(name, *(option(of, 4 + at, 8, 0, by) for at, of in enumerate(labels)))

    apart = layer("b", option("dense", 4, 8, 0, noise=3), option("int4 sym g64 plain", 40, 8, 0))
    assert noise([noisy("a", 0.1), apart]) is None
    line = noise([noisy("a", 0.1), noisy("b", 1.0), noisy("c", 2.0)])
    assert line is not None
    assert line.startswith("times are uncertain: most candidates tie for 2 of 3 layers, at worst")
    assert "'c', whose fastest is known to 100% of its time" in line
