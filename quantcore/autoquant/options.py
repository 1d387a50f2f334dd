"""What each linear may take, with what that costs: times of a profile, bytes and output error.

A profile says how often a linear is called with how many tokens; an option's time is

    sum over token counts t of calls(t) * median(t)

and so are both ends of its interval. Options whose interval overlaps that of the fastest among them
tie: no measurement told them apart. An interval tells of one run; another finds a median half a per
cent away, so none is taken to be narrower. Those that tie are compared by one time, the fastest's,
and so on with the fastest of the rest, so that noise decides little; `may_tie` tells what it may
still decide in another run.

Errors add up over linears: each is measured alone, with inputs of the unquantized model, as in the
integer program of HAWQ-V3 (Yao et al. 2020, https://arxiv.org/abs/2011.10680), whose objective is a
sum of one sensitivity per layer. Errors of different layers do act on each other (CLADO, 2023,
https://arxiv.org/abs/2307.05657, abstract); a factor for the whole model, found by a check of the
plan, is all that is made of that here. Any unit that adds up will do: squared output error relative
to the squared output, say.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantcore.autoquant.candidates import Candidate
from quantcore.autoquant.measurements import Product, Timings
from quantcore.errors import SpecError

_WIDE = 0.1  # of an interval, as a share of its time
_ANOTHER_RUN = 0.005  # of a time: how far away another run may find it


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    name: str
    calls: Mapping[int, float]  # by number of tokens

    def __post_init__(self) -> None:
        if not self.calls:
            raise SpecError("profile: it has no calls: write token counts and how often each is")
        for tokens, times in self.calls.items():
            if tokens < 1 or not 0 < times < math.inf:
                raise SpecError(
                    f"profile: {times} calls of {tokens} tokens: write 1 token or more, and a "
                    "number of calls above 0"
                )


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="decode_1", calls={1: 1}),
        Profile(name="decode_16", calls={16: 1}),
        Profile(name="prefill_2048", calls={2048: 1}),
        # one prompt and 256 steps of decoding, half of them alone and half among 16
        Profile(name="mix", calls={1: 128, 16: 128, 2048: 1}),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    time_us: float
    low_us: float
    high_us: float

    @property
    def least_us(self) -> float:
        return min(self.low_us, self.time_us * (1 - _ANOTHER_RUN))

    @property
    def most_us(self) -> float:
        return max(self.high_us, self.time_us * (1 + _ANOTHER_RUN))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    candidate: Candidate
    time: Time
    num_bytes: int
    error: float

    @property
    def label(self) -> str:
        return self.candidate.label()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One choice: a linear, or several that the engine fuses or that share a choice."""

    name: str
    linears: tuple[str, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or not self.linears:
            raise SpecError(f"'{self.name}': nothing to choose from: time one candidate at least")
        if len({option.label for option in self.options}) < len(self.options):
            raise SpecError(f"'{self.name}': a candidate stands twice among its options")
        for option in self.options:
            costs = (option.time.low_us, option.num_bytes, option.error)
            finite = (*costs, option.time.time_us, option.time.high_us)
            rising = option.time.low_us <= option.time.time_us <= option.time.high_us
            if not all(math.isfinite(cost) for cost in finite) or min(costs) < 0 or not rising:
                raise SpecError(
                    f"'{self.name}': {option.label}: times, bytes and error must be finite numbers "
                    f"from 0, not {option.time}, {option.num_bytes} and {option.error}"
                )


def profiled(timings: Timings, product: Product, profile: Profile) -> Time | None:
    """A product's time on a profile, whatever its own tokens are.

    None where a number of tokens was not timed, or not to its end: such a candidate is no option.
    """
    total = Time(time_us=0.0, low_us=0.0, high_us=0.0)
    for tokens, calls in sorted(profile.calls.items()):
        key = Product(
            candidate=product.candidate,
            dtype=product.dtype,
            rows=product.rows,
            columns=product.columns,
            tokens=tokens,
        )
        timing = timings.get(key)
        if timing is None or timing.stopped_early:
            return None
        total = Time(
            time_us=total.time_us + calls * timing.median_us,
            low_us=total.low_us + calls * timing.low_us,
            high_us=total.high_us + calls * timing.high_us,
        )
    return total


def compared_us(options: Sequence[Option]) -> list[float]:
    """The time that each is compared by: its own, or that of the fastest that it ties with."""
    order = sorted(range(len(options)), key=lambda at: (options[at].time.time_us, at))
    times = [0.0] * len(options)
    fastest = options[order[0]].time
    for at in order:
        if options[at].time.least_us > fastest.most_us:
            fastest = options[at].time
        times[at] = fastest.time_us
    return times


def may_tie(one: Time, other: Time) -> bool:
    """Whether a run that measures anew could find these two to tie, or the slower one faster.

    Twice what their intervals allow: both medians may be found elsewhere in theirs, and intervals
    as wide around those have to meet.
    """
    fast, slow = sorted((one, other), key=lambda time: time.time_us)
    allowed_us = (fast.most_us - fast.time_us) + (slow.time_us - slow.least_us)
    return slow.time_us - fast.time_us <= 2 * allowed_us


def noise(layers: Iterable[Layer]) -> str | None:
    """A warning where measurements were too wide to choose by: most of what there was has tied."""
    layers = list(layers)
    wide: list[tuple[float, Layer]] = []
    for layer in layers:
        times = compared_us(layer.options)
        fastest = min(layer.options, key=lambda option: option.time.time_us)
        spread = (fastest.time.high_us - fastest.time.low_us) / (fastest.time.time_us or 1.0)
        if spread > _WIDE and 2 * times.count(min(times)) > len(times) > 1:
            wide.append((spread, layer))
    if not wide:
        return None
    spread, layer = max(wide, key=lambda one: one[0])
    return (
        f"times are uncertain: most candidates tie for {len(wide)} of {len(layers)} layers, at "
        f"worst for '{layer.name}', whose fastest is known to {spread:.0%} of its time: measure "
        "again where nothing else runs"
    )
