"""Races by a clock that is made up: who runs how often, who loses, and what is known in the end."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from quantkernels import arrivals

from quantcore.autoquant import stopwatches
from quantcore.autoquant.candidates import DENSE, Candidate, candidate_of
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.race import Contender, Effort, Stopwatch, interval, race
from quantcore.autoquant.timing import Bench, Contest, timed
from quantcore.tensors import QuantizedTensor


@dataclass
class Clock:
    """Time passes when something is timed, and at no other time."""

    now_s: float = 0.0
    turns: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def watch(self, name: str, takes_us: Callable[[], float]) -> Stopwatch:
        def run(repeats: int) -> list[float]:
            self.turns.append(name)
            times = [takes_us() for _ in range(repeats)]
            self.now_s += sum(times) / 1e6
            return times

        return run

    def noisy(self, name: str, us: float, noise: float, seed: int = 0) -> Stopwatch:
        draw = random.Random(f"{name} {seed}")
        return self.watch(name, lambda: us * draw.uniform(1 - noise, 1 + noise))


def contender(watch: Stopwatch, *costs: float, known: Timing | None = None) -> Contender:
    return Contender({1: watch}, costs, {} if known is None else {1: known})


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [3, 8, 9, 12])
def test_an_interval_encloses_the_median_as_often_as_it_says(count: int, confidence: float) -> None:
    """Counted over all ways in which repeats fall below or above the median; no narrower does."""
    below = [sum(sides) for sides in product((0, 1), repeat=count)]

    def enclosing(rank: int) -> float:
        return sum(rank <= of <= count - rank for of in below) / 2**count

    low, middle, high = interval([float(at) for at in range(count, 0, -1)], confidence)
    assert middle == (count + 1) / 2
    rank = round(low)
    assert (low, high) == ((rank, count + 1 - rank) if rank else (0, float("inf")))
    assert enclosing(rank) >= confidence or rank == 0
    assert enclosing(rank + 1) < confidence
    assert interval([1.0] * 3000, confidence) == (1, 1, 1)


def test_a_race_ends_when_the_interval_is_narrow_or_the_seconds_are_spent() -> None:
    clock = Clock()
    watch = clock.noisy("one", 100.0, 0.2)
    ((one,),) = ([found[1]] for found in race([contender(watch)], {1: 1}, Effort(), clock))
    assert (one.high_us - one.low_us) / one.median_us <= 0.03
    assert one.low_us <= 100 <= one.high_us
    assert one.repeats == 2 * len(clock.turns) > 100
    assert not one.stopped_early
    short = Clock()
    watch = short.noisy("one", 100.0, 0.2)
    effort = Effort(seconds=40 * 100e-6)
    ((one,),) = ([found[1]] for found in race([contender(watch)], {1: 1}, effort, short))
    assert 40 <= one.repeats <= 56
    assert (one.high_us - one.low_us) / one.median_us > 0.03


def test_what_is_slower_and_no_better_in_anything_stops_after_a_round() -> None:
    clock = Clock()
    fast = contender(clock.noisy("fast", 100, 0.2), 5, 1)
    slow = contender(clock.noisy("slow", 200, 0.2), 5, 1)
    found = race([fast, slow], {1: 1}, Effort(), clock)
    assert clock.turns[:8] == ["fast", "slow"] * 4, "turns are short"
    assert clock.turns.count("slow") == 4 < clock.turns.count("fast")
    assert found[1][1].stopped_early and not found[0][1].stopped_early
    assert found[1][1].repeats == 8


@pytest.mark.parametrize("costs", [(4, 1), (5, 0)])
def test_what_is_slower_and_smaller_or_nearer_runs_to_its_end(costs: tuple[float, ...]) -> None:
    clock = Clock()
    fast = contender(clock.noisy("fast", 100, 0.2), 5, 1)
    slow = contender(clock.noisy("slow", 200, 0.2), *costs)
    _, found = race([fast, slow], {1: 1}, Effort(), clock)
    assert not found[1].stopped_early
    assert (found[1].high_us - found[1].low_us) / found[1].median_us <= 0.03


def test_what_is_slow_for_one_number_of_tokens_may_win_on_the_profile() -> None:
    clock = Clock()

    def two(name: str, one_us: float, many_us: float) -> Contender:
        watches = {1: clock.noisy(name, one_us, 0.1), 64: clock.noisy(name, many_us, 0.1)}
        return Contender(watches, (0.0,), {})

    wins = two("decodes slowly", 200, 1000)
    loses = two("decodes fast", 100, 2000)
    won, lost = race([loses, wins], {1: 5.0, 64: 1.0}, Effort(), clock)[::-1]
    assert not won[1].stopped_early and not won[64].stopped_early
    # 2000 beside 2500: told apart, after some rounds, by the sum alone
    assert won[1].median_us > lost[1].median_us
    assert any(timing.stopped_early for timing in lost.values())


def test_ties_run_to_their_ends_and_no_one_loses_by_noise() -> None:
    for seed in range(20):
        clock = Clock()
        both = [contender(clock.noisy(name, 100, 0.3, seed), 1) for name in ("a", "b")]
        for found in race(both, {1: 1}, Effort(), clock):
            assert not found[1].stopped_early


def test_what_is_known_does_not_run_but_still_beats_others() -> None:
    clock = Clock()
    known = Timing(median_us=100, low_us=99, high_us=101, repeats=50)
    found = race(
        [
            contender(clock.noisy("known", 1, 0.1), 1, known=known),
            contender(clock.noisy("slow", 200, 0.1), 1),
        ],
        {1: 1},
        Effort(),
        clock,
    )
    assert clock.turns == ["slow"] * 4
    assert found[0] == {} and found[1][1].stopped_early


def test_what_lost_before_runs_again_only_where_it_might_win_now() -> None:
    lost = Timing(median_us=200, low_us=190, high_us=210, repeats=8, stopped_early=True)
    known = Timing(median_us=100, low_us=99, high_us=101, repeats=50)
    for costs, runs in (((1, 1), False), ((0, 1), True)):
        clock = Clock()
        fast = contender(clock.noisy("fast", 1, 0.1), 1, 1, known=known)
        slow = contender(clock.noisy("slow", 200, 0.1), *costs, known=lost)
        found = race([fast, slow], {1: 1}, Effort(), clock)
        assert bool(clock.turns) == runs
        assert found[1] == {} or not found[1][1].stopped_early


def test_an_effort_is_above_nothing() -> None:
    for odd in ({"spread": 0.0}, {"seconds": 0.0}, {"round_repeats": 0}):
        with pytest.raises(ValueError, match="an effort"):
            Effort(**odd)


INT8 = candidate_of("int8 sym channel plain")
SHORT = Effort(spread=1.0, seconds=0.01)


def contest(*candidates: Candidate, tokens: int = 2) -> Contest:
    return Contest(
        rows=32,
        columns=64,
        dtype="bfloat16",
        calls={tokens: 1.0},
        costs={candidate: (float(at), -float(at)) for at, candidate in enumerate(candidates)},
    )


def test_products_are_timed_on_a_cpu_and_never_twice() -> None:
    bench = Bench("cpu", rotated_bytes=1 << 16)
    static = candidate_of("int8_static sym channel plain")
    first = timed(contest(DENSE, INT8, static), {}, bench, SHORT)
    assert {of.candidate for of in first} == {DENSE, INT8, static}
    assert all(of.tokens == 2 and timing.repeats >= 8 for of, timing in first.items())
    assert timed(contest(DENSE, INT8, static), first, Bench("none"), SHORT) == {}
    more = timed(contest(DENSE, INT8, tokens=3), first, bench, SHORT)
    assert {(of.candidate, of.tokens) for of in more} == {(DENSE, 3), (INT8, 3)}


def test_bytes_are_those_of_the_weight_as_it_lies() -> None:
    bench = Bench("cpu")
    assert bench.num_bytes(DENSE, 32, 64, "bfloat16") == 32 * 64 * 2
    assert bench.num_bytes(INT8, 32, 64, "bfloat16") == 32 * 64 + 32 * 2
    assert bench.num_bytes(candidate_of("int4 sym g32 int4_cpu"), 32, 64, "bfloat16") == (
        32 * 64 // 2 + 2 * 32 * 2 * 2
    )


def test_a_stopwatch_calls_copies_in_turn_that_no_cache_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(weight, QuantizedTensor)
        seen.append(weight.codes.data_ptr())
        return linear(x, weight, bias)

    one = Product(candidate=INT8, dtype="bfloat16", rows=32, columns=64, tokens=4)
    watch = Bench("cpu", rotated_bytes=10 * (32 * 64 + 64)).stopwatch(one)
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    times = watch(12)  # a slice has one call at least, on a machine that stands still
    assert len(times) == 12 and all(us > 0 for us in times) and min(times) < 1e5
    assert len(set(seen)) == 11
    assert all(one == seen[at % 11] for at, one in enumerate(seen))


def test_a_clock_takes_off_what_stands_between_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock()

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now.now_s += 40e-6
            return x

    def between(_: object) -> None:
        now.now_s += 25e-6

    monkeypatch.setattr(stopwatches.Between, "forward", between)
    monkeypatch.setattr(stopwatches.time, "perf_counter", now)
    watch = stopwatches.Clock([Slow(4, 4), Slow(4, 4)], torch.ones(1, 4))
    assert watch(3) == pytest.approx([40.0] * 3)
    assert watch._calls == round(2e-3 / 65e-6)
    monkeypatch.setattr(Slow, "forward", lambda _, x: x)
    assert min(watch(3)) > 0, "a time is one, however much noise there is in it"


def test_what_is_captured_in_a_race_leaves_others_counters_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, device = torch.zeros(4), torch.device("cuda")
    monkeypatch.setattr(arrivals, "_pools", {device: [mine]})
    with pytest.raises(RuntimeError), arrivals.apart():
        assert arrivals._pools == {}
        arrivals._pools[device] = [torch.ones(4)]
        raise RuntimeError
    assert arrivals._pools[device][0] is mine and len(arrivals._pools) == 1
