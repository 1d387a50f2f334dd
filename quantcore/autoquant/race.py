"""How long each of several contenders takes: rounds of a few repeats, till that is known or lost.

Of n repeats the l-th smallest and the l-th largest enclose the median with a probability of

    1 - 2 * sum over k < l of C(n, k) / 2^n

however times are distributed, if they are independent (David and Nagaraja 2003, Order Statistics,
section 7.1). Contenders take short turns, so that what drifts drifts for all: a GPU whose matrix
units draw all the power that it may have lowers its clock, by up to a tenth, some hundredths of a
second later. With turns that long each would set the next one's clock.

One is done when its intervals are narrow or its seconds are spent. It has lost, and runs no more,
when another that costs no more in anything else is faster beyond doubt: on the whole profile, the
other's upper bound is below its lower one. What is slower but smaller, or nearer the dense product,
has not lost. Intervals are looked at after every round, and each look may err: for losing they are
wider ones.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

from quantcore.autoquant.measurements import Timing

CONFIDENCE = 0.95
_CONFIDENCE_TO_LOSE = 0.99
_TURN = 2  # repeats

Stopwatch = Callable[[int], list[float]]  # microseconds of a call, for each of so many repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How well a time must be known, and what that may cost."""

    spread: float = 0.03  # of a confidence interval, as a share of the median
    seconds: float = 1.0  # for each contender and number of tokens
    round_repeats: int = 8  # the fewest that have an interval to lose by

    def on(self, device: str) -> Self:
        """A GPU's repeats are short and alike: a third of the spread costs it next to nothing."""
        return self if device == "cpu" else replace(self, spread=self.spread / 3)

    def __post_init__(self) -> None:
        if not self.spread > 0 or not self.seconds > 0 or self.round_repeats < 1:
            raise ValueError(f"an effort has a spread, seconds and repeats above 0, not {self}")


@dataclass(frozen=True, slots=True)
class Contender:
    """By number of tokens, how it is timed; what is known already is not timed."""

    watches: Mapping[int, Stopwatch]
    costs: tuple[float, ...]  # all else that is better when it is less
    known: Mapping[int, Timing]


@dataclass(slots=True)
class _Runner:
    contender: Contender
    calls: Mapping[int, float]
    samples: dict[int, list[float]]
    spent_s: dict[int, float]
    lost: bool = False

    def bounds(self) -> tuple[float, float]:
        """Of all calls together: what it takes at least, and at most."""
        pairs = [(times, self._bounds(tokens)) for tokens, times in self.calls.items()]
        low_us = math.fsum(times * low for times, (low, _) in pairs)
        return low_us, math.fsum(times * high for times, (_, high) in pairs)

    def _bounds(self, tokens: int) -> tuple[float, float]:
        known = self.contender.known.get(tokens)
        samples = self.samples.get(tokens, [])
        if samples:
            low, _, high = interval(samples, _CONFIDENCE_TO_LOSE)
            return low, high
        if known is None:
            return 0.0, math.inf
        return known.low_us, known.high_us

    def open_tokens(self, effort: Effort) -> list[int]:
        """Where more repeats are wanted."""
        return [] if self.lost else [t for t in self.calls if not self._is_done(t, effort)]

    def _is_done(self, tokens: int, effort: Effort) -> bool:
        known = self.contender.known.get(tokens)
        if known is not None and not known.stopped_early:
            return True
        samples = self.samples.get(tokens, [])
        if not samples:
            return False
        if self.spent_s.get(tokens, 0.0) >= effort.seconds:
            return True
        low, median, high = interval(samples, CONFIDENCE)
        return high - low <= effort.spread * median

    def run(self, tokens: int, repeats: int, clock: Callable[[], float]) -> None:
        begun_s = clock()
        self.samples.setdefault(tokens, []).extend(self.contender.watches[tokens](repeats))
        self.spent_s[tokens] = self.spent_s.get(tokens, 0.0) + clock() - begun_s

    def timings(self, effort: Effort) -> dict[int, Timing]:
        """What was timed here. One that lost may be precise for some numbers of tokens already."""
        found = {}
        for tokens, samples in self.samples.items():
            low, median, high = interval(samples, CONFIDENCE)
            found[tokens] = Timing(
                median_us=median,
                low_us=max(low, min(samples)),
                high_us=min(high, max(samples)),
                repeats=len(samples),
                stopped_early=self.lost and not self._is_done(tokens, effort),
            )
        return found


def race(
    contenders: Sequence[Contender],
    calls: Mapping[int, float],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[int, Timing]]:
    """For each contender, by number of tokens, what was timed: nothing of what is known."""
    runners = [_Runner(contender, calls, {}, {}) for contender in contenders]
    while True:
        _drop_losers(runners, effort)
        turns = [(runner, runner.open_tokens(effort)) for runner in runners]
        if not any(tokens for _, tokens in turns):
            return [runner.timings(effort) for runner in runners]
        for repeats in _in_turns(effort.round_repeats):
            for runner, tokens in turns:
                for count in tokens:
                    runner.run(count, repeats, clock)


def _in_turns(repeats: int) -> list[int]:
    short, left = divmod(repeats, _TURN)
    return [_TURN] * short + [left] * (left > 0)


def _drop_losers(runners: Iterable[_Runner], effort: Effort) -> None:
    runners = list(runners)
    bounds = [runner.bounds() for runner in runners]
    for runner, (low_us, _) in zip(runners, bounds, strict=True):
        if runner.open_tokens(effort):
            runner.lost = any(
                high_us < low_us and _costs_no_more(other.contender, runner.contender)
                for other, (_, high_us) in zip(runners, bounds, strict=True)
            )


def _costs_no_more(one: Contender, other: Contender) -> bool:
    return all(a <= b for a, b in zip(one.costs, other.costs, strict=True))


def interval(times: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Lower bound, median, upper bound; nothing bounds the median of too few repeats."""
    times = sorted(times)
    rank = _rank(len(times), confidence)
    median = statistics.median(times)
    if rank == 0:
        return 0.0, median, math.inf
    return times[rank - 1], median, times[-rank]


@cache
def _rank(count: int, confidence: float) -> int:
    """The largest l, 0 if there is none."""
    rank, outside, ways = 0, 0, 1
    while rank < count:
        outside += ways
        if 2 * outside / 2**count > 1 - confidence:
            break
        ways = ways * (count - rank) // (rank + 1)
        rank += 1
    return rank
