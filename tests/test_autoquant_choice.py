"""What is chosen of few candidates, by hand; ties, runners-up, and what is refused."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcore.autoquant.choice import Budgets, choose
from quantcore.autoquant.front import front, within
from quantcore.autoquant.options import Layer, Time, noise
from quantcore.errors import SpecError
from tests.benchmarks.plan_choice import model
from tests.plans import LABELS, layer, option


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
