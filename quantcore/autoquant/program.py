"""The integer program: one option per layer, so that one sum is least and others have a limit.

    min sum v_lo x_lo   with   sum u_lo x_lo <= limit   and, for each layer l,   sum over o x_lo = 1

(A multiple-choice knapsack, by scipy's milp, that is HiGHS.) First it is made
small. With multipliers m >= 0, here those of the relaxation to real numbers, a plan costs at least

    sum over l of min over o of r_lo, less m * limit,   where r_lo = v_lo + m u_lo

so once some plan is known, an option that lifts this bound past that plan's cost is in no better
one. That leaves a few options of a few layers (Pisinger 1995, A minimal algorithm for the
multiple-choice knapsack problem, has the idea of such a core).

Blocks are alike, so many plans are nearly as good, and to prove one the best may take minutes. A
search of the solver's ends after so many nodes, which no clock decides: the same in every run. Of
16 programs as measured on one H100, of 48 to 144 linears with some 41 candidates each, whose best
was proven, 15 had it as their answer, and one was 0.03 per cent from it; most take a second.

A solver answers within tolerances, so sums are scaled to what is left of them once each layer takes
its least, and its answer is added up anew: one past a limit is ruled out, and the solver asked
again. A sum keeps a limit when it is over it by no more than a part in 1e9, which is what adding in
another order may change.

Shape suffixes: V = pairs of a layer and an option, R = limits.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array

from quantcore.autoquant.solvers import linprog, milp
from quantcore.errors import QuantizationError

TOLERANCE = 1e-9
_SCALE = 1e4  # what is left of a sum, in the solver's numbers: its tolerances are near 1e-6
_MOST_ROUNDINGS = 4096
_MOST_SWAPS, _MOST_SWAPPED = 64, 512
_MOST_WORK = 40_000  # nodes of a search, times the pairs that it is among
_QUICKLY_SOLVED = 48  # options of layers that have more than one left: the solver takes 10 ms

Floats = NDArray[np.float64]
Costs = Mapping[str, Sequence[Sequence[float]]]  # by name of the sum: by layer, by option
Picks = tuple[int, ...]  # by layer, which option
Kept = list[list[int]]  # by layer, options that may still be picked


def keeps(total: float, limit: float) -> bool:
    return total <= limit * (1 + TOLERANCE)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """What is left to decide, in the solver's numbers: value_V x -> min, limit_RV x <= _SCALE."""

    pairs: list[tuple[int, int]]
    layer_V: NDArray[np.int64]
    value_V: Floats
    limit_RV: Floats


class Program:
    """All sums of one problem; each layer's options numbered as they were given."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def total(self, name: str, picks: Sequence[int]) -> float:
        return math.fsum(of[at] for of, at in zip(self._costs[name], picks, strict=True))

    def least(
        self, order: Sequence[str], limits: Mapping[str, float], *, thorough: bool = True
    ) -> Picks | None:
        """Least in the first sum; of those that are, in the second, and so on. None: none fits.

        If it is not to be thorough, large programs are left as exchanges have improved them.
        """
        limits = dict(limits)
        kept = [list(range(len(of))) for of in next(iter(self._costs.values()))]
        picks: Picks | None = None
        for name in order:
            possible = self._possible(limits, kept)
            found = (
                None
                if possible is None
                else self._least(name, limits, possible, picks, thorough=thorough)
            )
            if found is None:
                assert picks is None, "the last answer keeps the limit that it set"
                return None
            picks, kept = found
            limits[name] = min(limits.get(name, math.inf), self.total(name, picks))
        return picks

    def _least(
        self,
        name: str,
        limits: Mapping[str, float],
        kept: Kept,
        known: Picks | None,
        *,
        thorough: bool,
    ) -> tuple[Picks, Kept] | None:
        """The least, and what any plan as good may pick."""
        scaled = self._scaled(name, limits, kept)
        relaxed = _relaxed(scaled)
        if relaxed is None:
            return None
        x_V, multiplier_R = relaxed
        roundings = [*_roundings(scaled, x_V), *([known] if known else [])]
        fitting = [picks for picks in roundings if self._fits(picks, limits)]
        picks = min(fitting, key=lambda picks: self.total(name, picks), default=None)
        if picks is not None:
            swapped = _swapped(scaled, multiplier_R, picks)
            picks = swapped if self._fits(swapped, limits) else picks
            core = _no_dearer(scaled, multiplier_R, picks)
            if thorough or sum(len(of) for of in core if len(of) > 1) <= _QUICKLY_SOLVED:
                small = self._scaled(name, limits, core)
                found = self._solve(small, limits, _MOST_WORK // len(small.pairs))
                if found is not None and self.total(name, found) < self.total(name, picks):
                    picks = found
        else:
            picks = self._solve(scaled, limits)
        return None if picks is None else (picks, _no_dearer(scaled, multiplier_R, picks))

    def _solve(
        self, scaled: _Scaled, limits: Mapping[str, float], nodes: int | None = None
    ) -> Picks | None:
        """Layers with one option left add nothing to any sum: the solver does not see them.

        None where nothing fits, or nothing was found within so many nodes.
        """
        free_V = np.bincount(scaled.layer_V)[scaled.layer_V] > 1
        x_V = np.ones(len(scaled.pairs))
        if not free_V.any():
            picks = tuple(option for _, option in scaled.pairs)
            return picks if self._fits(picks, limits) else None
        constraints = [LinearConstraint(_one_each(scaled.layer_V[free_V]), 1, 1)]
        constraints += [
            LinearConstraint(row_V[free_V], -np.inf, _SCALE) for row_V in scaled.limit_RV
        ]
        while True:
            result = milp(
                scaled.value_V[free_V],
                integrality=np.ones(free_V.sum()),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0} | ({} if nodes is None else {"node_limit": nodes}),
            )
            if (nodes is not None and result.x is None) or not _has_answer(result):
                return None
            x_V[free_V] = result.x
            at = _largest(scaled, x_V)
            picks = tuple(scaled.pairs[place][1] for place in at)
            if self._fits(picks, limits):
                return picks
            ruled_out_V = np.zeros(len(scaled.pairs))
            ruled_out_V[at] = 1
            most = ruled_out_V[free_V].sum() - 1
            constraints.append(LinearConstraint(ruled_out_V[free_V], -np.inf, most))

    def _fits(self, picks: Picks, limits: Mapping[str, float]) -> bool:
        return all(keeps(self.total(name, picks), limit) for name, limit in limits.items())

    def _possible(self, limits: Mapping[str, float], kept: Kept) -> Kept | None:
        """The options that fit if all other layers take their least. None: none fit."""
        before = None
        while kept != before:
            before = kept
            for name, limit in limits.items():
                room = self._room(name, limit, kept)
                if room < 0:
                    return None
                kept = [
                    [at for at in options if of[at] - _least_of(of, options) <= room]
                    for of, options in zip(self._costs[name], kept, strict=True)
                ]
        return kept

    def _scaled(self, name: str, limits: Mapping[str, float], kept: Kept) -> _Scaled:
        pairs = [(layer, option) for layer, options in enumerate(kept) for option in options]
        value_V = self._excess(name, kept)
        rows = []
        for limited, limit in limits.items():
            excess_V = self._excess(limited, kept)
            if excess_V.any():
                rows.append(excess_V / self._room(limited, limit, kept) * _SCALE)
        return _Scaled(
            pairs=pairs,
            layer_V=np.array([layer for layer, _ in pairs]),
            value_V=value_V / (value_V.max() or 1.0) * _SCALE,
            limit_RV=np.array(rows).reshape(len(rows), len(pairs)),
        )

    def _room(self, name: str, limit: float, kept: Kept) -> float:
        """What a limit leaves once each layer takes its least."""
        least = map(_least_of, self._costs[name], kept)
        return limit * (1 + TOLERANCE) - math.fsum(least)

    def _excess(self, name: str, kept: Kept) -> Floats:
        """What each pair adds to the least that the sum can be."""
        of_layers = zip(self._costs[name], kept, strict=True)
        return np.array(
            [of[at] - _least_of(of, options) for of, options in of_layers for at in options]
        )


def _least_of(costs: Sequence[float], options: Sequence[int]) -> float:
    return min(costs[at] for at in options)


def _one_each(layer_V: NDArray[np.int64]) -> Any:
    """By layer, which pairs are its own."""
    _, row_V = np.unique(layer_V, return_inverse=True)
    return csr_array((np.ones(len(row_V)), (row_V, np.arange(len(row_V)))))


def _relaxed(scaled: _Scaled) -> tuple[Floats, Floats] | None:
    """The program in real numbers: x, and a multiplier for each limit. None: nothing fits."""
    limited = len(scaled.limit_RV) > 0
    result = linprog(
        scaled.value_V,
        A_ub=scaled.limit_RV if limited else None,
        b_ub=np.full(len(scaled.limit_RV), _SCALE) if limited else None,
        A_eq=_one_each(scaled.layer_V),
        b_eq=np.ones(int(scaled.layer_V[-1]) + 1),
    )
    if not _has_answer(result):
        return None
    return result.x, np.maximum(0, -result.ineqlin.marginals) if limited else np.zeros(0)


def _has_answer(result: Any) -> bool:
    if result.status == 2:
        return False
    if result.x is None:
        raise QuantizationError(f"the solver gave no plan: {result.message}")
    return True


def _roundings(scaled: _Scaled, x_V: Floats) -> Iterator[Picks]:
    """Whole plans beside the relaxation's, which splits as many layers as there are limits."""
    largest = _largest(scaled, x_V)
    at = [scaled.pairs[place][1] for place in largest]
    split = [layer for layer, place in enumerate(largest) if x_V[place] < 1 - 1e-6]
    choices = [[option for of, option in scaled.pairs if of == layer] for layer in split]
    for options in itertools.islice(itertools.product(*choices), _MOST_ROUNDINGS):
        for layer, option in zip(split, options, strict=True):
            at[layer] = option
        yield tuple(at)


def _largest(scaled: _Scaled, x_V: Floats) -> list[int]:
    """By layer, the place of the pair with the largest x."""
    order = np.lexsort((-x_V, scaled.layer_V))
    return [int(place) for place in order[np.flatnonzero(np.diff(scaled.layer_V, prepend=-1))]]


def _swapped(scaled: _Scaled, multiplier_R: Floats, picks: Picks) -> Picks:
    """Improved by the best change of two layers at once, as long as one fits that improves.

    The solver would find as good a plan, but has more to look at until then.
    """
    lift_V, _ = _lifts(scaled, multiplier_R)
    near_V = np.sort(np.argsort(lift_V, kind="stable")[:_MOST_SWAPPED])
    layer_V, value_V = scaled.layer_V[near_V], scaled.value_V[near_V]
    limit_RV = scaled.limit_RV[:, near_V]
    at = _places(scaled, picks)
    for _ in range(_MOST_SWAPS):
        here_V = at[layer_V]
        gain_V = value_V - scaled.value_V[here_V]
        more_RV = limit_RV - scaled.limit_RV[:, here_V]
        room_R = _SCALE - scaled.limit_RV[:, at].sum(axis=1)
        fits_VV = layer_V[:, None] != layer_V
        for more_V, room in zip(more_RV, room_R, strict=True):
            fits_VV &= more_V[:, None] + more_V <= room
        gain_VV = np.where(fits_VV, gain_V[:, None] + gain_V, 0.0)
        one, other = np.unravel_index(gain_VV.argmin(), gain_VV.shape)
        if gain_VV[one, other] >= -TOLERANCE * _SCALE:
            break
        for change in (one, other):
            at[layer_V[change]] = near_V[change]
    return tuple(scaled.pairs[place][1] for place in at)


def _places(scaled: _Scaled, picks: Picks) -> NDArray[np.int64]:
    """Where the picks stand among the pairs; all of them do."""
    picked = [place for place, (layer, option) in enumerate(scaled.pairs) if picks[layer] == option]
    assert len(picked) == len(picks)
    return np.array(picked)


def _lifts(scaled: _Scaled, multiplier_R: Floats) -> tuple[Floats, float]:
    """How far each pair lifts the bound on any plan's cost, and that bound."""
    cost_V = scaled.value_V + multiplier_R @ scaled.limit_RV
    starts = np.flatnonzero(np.diff(scaled.layer_V, prepend=-1))
    least_L = np.minimum.reduceat(cost_V, starts)
    return cost_V - least_L[scaled.layer_V], float(least_L.sum() - _SCALE * multiplier_R.sum())


def _no_dearer(scaled: _Scaled, multiplier_R: Floats, picks: Picks) -> Kept:
    """The options that a plan may pick which costs no more than these picks."""
    lift_V, bound = _lifts(scaled, multiplier_R)
    slack = scaled.value_V[_places(scaled, picks)].sum() - bound
    slack += 1e-6 + TOLERANCE * (abs(bound) + _SCALE * multiplier_R.sum())
    kept: Kept = [[] for _ in picks]
    for (layer, option), lift in zip(scaled.pairs, lift_V, strict=True):
        if lift <= slack:
            kept[layer].append(option)
    return kept
