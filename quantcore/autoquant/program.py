"""The integer program: one option per layer, so that one sum is least and others have a limit.

    min sum v_lo x_lo   with   sum over o of x_lo = 1 for each layer l,   sum u_lo x_lo <= limit

(scipy's milp, that is HiGHS, to a gap of nothing.) A solver answers within tolerances, so all sums
are scaled to what is left of them once each layer takes its least, and what it answers is added up
anew: an answer past a limit is ruled out, and the solver asked again. A sum keeps a limit when it
is over it by no more than a part in 1e9, which is what adding in another order may change.

Shape suffixes: L = layers, V = pairs of a layer and an option.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from quantcore.errors import QuantizationError

TOLERANCE = 1e-9
_SCALE = 1e4  # what is left of a sum, in the solver's numbers: its tolerances are near 1e-6

Floats = NDArray[np.float64]
Costs = Mapping[str, Sequence[Sequence[float]]]  # by name of the sum: by layer, by option
Picks = tuple[int, ...]  # by layer, which option


def keeps(total: float, limit: float) -> bool:
    return total <= limit * (1 + TOLERANCE)


class Program:
    """All sums of one problem; each layer's options numbered as they were given."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def total(self, name: str, picks: Picks) -> float:
        return math.fsum(of[at] for of, at in zip(self._costs[name], picks, strict=True))

    def least_total(self, name: str) -> float:
        """Of one sum without any limit."""
        return math.fsum(min(of) for of in self._costs[name])

    def least(self, order: Sequence[str], limits: Mapping[str, float]) -> Picks | None:
        """Least in the first sum; of those that are, in the second, and so on. None: none fits."""
        limits = dict(limits)
        picks: Picks | None = None
        for name in order:
            picks = self._least(name, limits)
            if picks is None:
                return None
            limits[name] = min(limits.get(name, math.inf), self.total(name, picks))
        return picks

    def _least(self, name: str, limits: Mapping[str, float]) -> Picks | None:
        kept = self._possible(limits)
        if kept is None:
            return None
        if all(len(options) == 1 for options in kept):
            return tuple(options[0] for options in kept)
        pairs = [(layer, option) for layer, options in enumerate(kept) for option in options]
        layer_V = np.array([layer for layer, _ in pairs])
        one_each = csr_array((np.ones(len(pairs)), (layer_V, range(len(pairs)))))
        rows, ends = [], []
        for limited, limit in limits.items():
            excess_V, room = self._excess(limited, kept), self._room(limited, limit, kept)
            if excess_V.any():
                rows.append(excess_V / room * _SCALE)
                ends.append(_SCALE)
        value_V = self._excess(name, kept)
        value_V = value_V / (value_V.max() or 1.0) * _SCALE
        while True:
            x_V = _solved(value_V, one_each, rows, ends)
            if x_V is None:
                return None
            at = [int(np.flatnonzero(layer_V == layer)[0]) for layer in range(len(kept))]
            for place, (layer, _) in enumerate(pairs):
                if x_V[place] > x_V[at[layer]]:
                    at[layer] = place
            picks = tuple(pairs[place][1] for place in at)
            if all(keeps(self.total(limited, picks), limit) for limited, limit in limits.items()):
                return picks
            ruled_out_V = np.zeros(len(pairs))
            ruled_out_V[at] = 1
            rows.append(ruled_out_V)
            ends.append(len(kept) - 1)

    def _possible(self, limits: Mapping[str, float]) -> list[list[int]] | None:
        """By layer, the options that fit if all other layers take their least. None: none fit."""
        kept = [list(range(len(of))) for of in next(iter(self._costs.values()))]
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

    def _room(self, name: str, limit: float, kept: Sequence[Sequence[int]]) -> float:
        """What a limit leaves once each layer takes its least."""
        least = map(_least_of, self._costs[name], kept)
        return limit * (1 + TOLERANCE) - math.fsum(least)

    def _excess(self, name: str, kept: Sequence[Sequence[int]]) -> Floats:
        """What each pair adds to the least that the sum can be."""
        of_layers = zip(self._costs[name], kept, strict=True)
        return np.array(
            [of[at] - _least_of(of, options) for of, options in of_layers for at in options]
        )


def _least_of(costs: Sequence[float], options: Sequence[int]) -> float:
    return min(costs[at] for at in options)


def _solved(value_V: Floats, one_each: Any, rows: list[Floats], ends: list[float]) -> Any:
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [
        LinearConstraint(csr_array(row_V[None]), -np.inf, end)
        for row_V, end in zip(rows, ends, strict=True)
    ]
    result = milp(
        value_V,
        integrality=np.ones(len(value_V)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    if result.x is None:
        raise QuantizationError(f"the solver gave no plan: {result.message}")
    return result.x
