"""Which of a few plans is fastest when the whole model runs: timed end to end, by turns.

Predictions add up linears that were timed alone, and may be off by more than plans differ. So the
chosen plan, the dense model and the uniform plans near it run as the caller's model is run, and one
of them is kept: the chosen one, unless another that keeps the budgets is faster, by more than their
intervals allow or by more than 2 per cent.

What they took also corrects what is predicted. With T measured, and D and P what the linears that
take a kernel were timed at, dense and by it, each kernel's times are scaled by

    (T_plan - T_dense + D) / P

of the plans that take this kernel alone beside dense weights. A kernel is told by scheme and
layout: groups and zero points share it, so that those that tie go on to tie.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from quantcore.autoquant.candidates import DENSE_LABEL, candidate_of
from quantcore.autoquant.divergence import place, undone
from quantcore.autoquant.document import End
from quantcore.autoquant.measurements import Timing
from quantcore.autoquant.options import Layer, Option, Time
from quantcore.autoquant.race import Contender, Effort, Stopwatch, race
from quantcore.autoquant.swapping import join, swap
from quantcore.recorder import InputStatistics

# Of a model as a plan leaves it, what is timed: it does once what the profile says
Prepare = Callable[[nn.Module], Callable[[], object]]
# The same by number of tokens, each timed for itself
PrepareEach = Callable[[nn.Module], Mapping[int, Callable[[], object]]]
Labels = Mapping[str, str]  # by layer

EFFORT = Effort(spread=0.01, seconds=4.0, round_repeats=2)
_FEWEST = 6  # repeats, however long one takes: with fewer nothing bounds a median
_LONG_US = 1e5  # what ran before does not show in as much
_MOST_UNIFORMS = 3
MOST = 2 + _MOST_UNIFORMS  # that run in one's turn: with the chosen plan and the dense model
_NEAR = 0.2  # of a plan's time: predictions were never off by as much
_TIE = 0.02  # however wide intervals are
_WIDE = 0.1  # of an interval, as a share of its time
_MOST_SCALED = 2.0  # a kernel's factor, or its inverse: what is further off is another fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    plan: str
    labels: Labels
    time_us: float  # of its linears, predicted
    error: float
    num_bytes: int = 0  # of its linears
    fits: bool = True


class Timed(Protocol):
    """Finalists run by turns; None of one that there was no room for, which the first two never
    are."""

    def __call__(self, finalists: Sequence[Finalist], /) -> Sequence[Timing | None]: ...


@dataclass(slots=True)
class _Dressed:
    """What stands in the model's places under one plan, and how it runs, by number of tokens."""

    linears: Mapping[str, nn.Module]
    weights: Mapping[str, nn.Parameter]
    runs: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    took_us: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Stage:
    """One model on which finalists take turns. It is as before whenever no one runs."""

    model: nn.Module
    layers: Mapping[str, Sequence[str]]  # their linears
    joined: Sequence[Sequence[str]]
    recorder: Mapping[str, InputStatistics] | None
    prepare: PrepareEach
    calls: Mapping[int, float]  # how often each of what it gives is run, by number of tokens
    effort: Effort = EFFORT
    _known: dict[tuple[str, ...], _Dressed] = field(default_factory=dict)

    def timed(self, finalists: Sequence[Finalist]) -> list[Timing]:
        return self.timed_as([finalist.labels for finalist in finalists])

    def timed_as(self, plans: Sequence[Labels]) -> list[Timing]:
        names = [name for of in self.layers.values() for name in of]
        with undone(self.model, names):
            watches = [self._watches(labels) for labels in plans]
            first_us = [watch(1)[0] for of in watches for watch in of.values()]
            seconds = max(self.effort.seconds, _FEWEST * max(first_us) / 1e6)
            contenders = [Contender(of, (), {}) for of in watches]
            found = race(contenders, self.calls, replace(self.effort, seconds=seconds))
        return [_of_all(timings, self.calls) for timings in found]

    def _watches(self, labels: Labels) -> dict[int, Stopwatch]:
        key = tuple(labels[layer] for layer in self.layers)
        if key not in self._known:
            self._known[key] = self._dressed(labels)
        dressed = self._known[key]

        def watch(tokens: int, repeats: int) -> list[float]:
            self._place(dressed)
            run = dressed.runs[tokens]
            if dressed.took_us.get(tokens, 0.0) < _LONG_US:
                run()  # after others' turn
            times = [_microseconds(run) for _ in range(repeats)]
            dressed.took_us[tokens] = times[-1]
            return times

        return {tokens: partial(watch, tokens) for tokens in self.calls}

    def _dressed(self, labels: Labels) -> _Dressed:
        names = [name for of in self.layers.values() for name in of]
        with undone(self.model, names):
            by_linear = {name: labels[layer] for layer, of in self.layers.items() for name in of}
            swap(self.model, by_linear, self.recorder)
            weights = {name: self.model.get_submodule(name).weight for name in names}
            for together in self.joined:
                join(self.model, together)
                for name in together:
                    del weights[name]  # it is in the joined one, and no memory is held twice
            linears = {name: self.model.get_submodule(name) for name in names}
            dressed = _Dressed(linears, weights)  # type: ignore[arg-type]
            dressed.runs = self.prepare(self.model)
        return dressed

    def _place(self, dressed: _Dressed) -> None:
        for name, linear in dressed.linears.items():
            place(self.model, name, linear)
        for name, weight in dressed.weights.items():
            dressed.linears[name].weight = weight


def _of_all(timings: Mapping[int, Timing], calls: Mapping[int, float]) -> Timing:
    """Of a whole profile: medians add up, and so do both ends of their intervals."""

    def total(us: Callable[[Timing], float]) -> float:
        return math.fsum(times * us(timings[tokens]) for tokens, times in calls.items())

    return Timing(
        median_us=total(lambda of: of.median_us),
        low_us=total(lambda of: of.low_us),
        high_us=total(lambda of: of.high_us),
        repeats=min(of.repeats for of in timings.values()),
        stopped_early=any(of.stopped_early for of in timings.values()),
    )


def _microseconds(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return (time.perf_counter() - start) * 1e6


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def near(chosen: Finalist, uniforms: Sequence[Finalist]) -> list[Finalist]:
    """Those that may be faster after all, and the dense model, which is what others are told by."""
    others = [of for of in uniforms if of.plan != DENSE_LABEL and of.fits]
    others = [of for of in others if of.time_us <= chosen.time_us * (1 + _NEAR)]
    others.sort(key=lambda of: (of.time_us, of.error, of.plan))
    found = [of for of in uniforms if of.plan == DENSE_LABEL]
    for other in others:
        alike = [of for of in (chosen, *found) if of.labels == other.labels]
        if not alike and len(found) <= _MOST_UNIFORMS:
            found.append(other)
    return [chosen, *(of for of in found if of.labels != chosen.labels)]


def ends(
    finalists: Sequence[Finalist], timings: Sequence[Timing], before: Mapping[str, End]
) -> dict[str, End]:
    """By plan. What is predicted is told with the dense model's rest, once that was timed."""
    found = dict(before)
    times = dict(zip((of.plan for of in finalists), timings, strict=True))
    dense = _dense(finalists)
    rest_us = None if dense is None else times[dense.plan].median_us - dense.time_us
    for finalist in finalists:
        timing, known = times[finalist.plan], before.get(finalist.plan)
        predicted = None if rest_us is None else rest_us + finalist.time_us
        found[finalist.plan] = End(
            plan=finalist.plan,
            predicted_us=known.predicted_us if known else predicted,
            measured_us=timing.median_us,
            low_us=timing.low_us,
            high_us=timing.high_us,
        )
    return found


def kept(finalists: Sequence[Finalist], found: Mapping[str, End]) -> list[Finalist]:
    """From the one to keep on: the chosen, where it ties with the fastest; of others that do, those
    with the least error first; then the rest by their times."""
    fitting = [of for of in finalists if of.fits]
    fastest = min((found[of.plan] for of in fitting), key=lambda end: end.measured_us)

    def order(finalist: Finalist) -> tuple[bool, bool, float, float]:
        end = found[finalist.plan]
        near_by = end.measured_us <= fastest.measured_us * (1 + _TIE)
        ties = near_by and end.low_us <= fastest.high_us
        is_chosen = finalist is finalists[0]
        return not ties, not (ties and is_chosen), finalist.error if ties else 0, end.measured_us

    return sorted(fitting, key=order)


def noise(found: Iterable[End]) -> str | None:
    """A warning where what is kept is known too little to be kept for its time."""
    for end in found:
        spread = (end.high_us - end.low_us) / end.measured_us
        if end.kept and spread > _WIDE:
            return (
                f"times of whole models are uncertain: {end.plan} is known to {spread:.0%} of its "
                "time: run them again where nothing else runs"
            )
    return None


def factors(
    layers: Sequence[Layer], finalists: Sequence[Finalist], found: Mapping[str, End]
) -> dict[str, float]:
    """By kernel, `int4 int4_cpu`, what its times are to be scaled by."""
    times = {layer.name: {of.label: of.time.time_us for of in layer.options} for layer in layers}
    dense = _dense(finalists)
    if dense is None or any(DENSE_LABEL not in of for of in times.values()):
        return {}
    many: dict[str, list[float]] = {}
    for finalist in finalists:
        taking = {n: label for n, label in finalist.labels.items() if label != DENSE_LABEL}
        kernels = {kernel_of(label) for label in taking.values()}
        if len(kernels) == 1:
            dense_us = sum(times[name][DENSE_LABEL] for name in taking)
            timed_us = sum(times[name][label] for name, label in taking.items())
            saved_us = found[dense.plan].measured_us - found[finalist.plan].measured_us
            factor = (dense_us - saved_us) / timed_us
            if 1 / _MOST_SCALED <= factor <= _MOST_SCALED:
                many.setdefault(kernels.pop(), []).append(factor)
    return {kernel: statistics.median(of) for kernel, of in sorted(many.items())}


def _dense(finalists: Sequence[Finalist]) -> Finalist | None:
    return next((of for of in finalists if set(of.labels.values()) == {DENSE_LABEL}), None)


def kernel_of(label: str) -> str:
    candidate = candidate_of(label)
    name = DENSE_LABEL if candidate.scheme is None else candidate.scheme.name
    return f"{name} {candidate.layout}"


def scaled(layers: Sequence[Layer], by_kernel: Mapping[str, float]) -> list[Layer]:
    def option(of: Option) -> Option:
        factor = by_kernel.get(kernel_of(of.label), 1.0)
        time_us, low_us, high_us = (factor * us for us in astuple(of.time))
        return replace(of, time=Time(time_us=time_us, low_us=low_us, high_us=high_us))

    return [replace(layer, options=tuple(map(option, layer.options))) for layer in layers]
