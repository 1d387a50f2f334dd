"""All that could be chosen at other budgets: the Pareto front of time and error, kept as data.

By the epsilon-constraint method (Haimes, Lasdon and Wismer 1971): from the plan of least error on,
each next one is that of least error among those faster than the last by one step at least, and of
its equals in error the fastest. A plan that is not on the front is no more than one step faster
than a plan of the front with no more error than its own. A step is a fraction of the time between
the two ends.

A front is to be looked at: where the solver would take long for a point, the relaxation's rounding,
improved by exchanges, stands for it (up to 4 per cent more error were seen). A budget is chosen for
anew (choice.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantcore.autoquant.choice import COMPARED, ORDERS, Budgets, Problem, Totals
from quantcore.autoquant.options import Layer
from quantcore.autoquant.program import TOLERANCE, Picks, keeps

RESOLUTION = 1 / 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    totals: Totals
    labels: tuple[str, ...]  # by layer, layers by name


def front(
    layers: Sequence[Layer],
    num_bytes: float | None = None,
    correction: float = 1.0,
    resolution: float = RESOLUTION,
) -> tuple[Point, ...]:
    """From the least error to the least time, within bytes; empty where nothing has so few."""
    assert 0 < resolution <= 1
    problem, budget = Problem(layers, correction), Budgets(num_bytes=num_bytes).limits()
    last = problem.least(ORDERS["time"], budget)
    found = problem.least(ORDERS["error"], budget)
    if last is None or found is None:
        return ()
    end = problem.total(COMPARED, last)
    step = max(resolution * (problem.total(COMPARED, found) - end), 4 * TOLERANCE * end)
    points: list[Picks] = []
    while found is not None and not keeps(problem.total(COMPARED, found), end):
        points.append(found)
        limit = problem.total(COMPARED, found) - step
        limits = {**budget, COMPARED: max(limit, end)}
        found = problem.least(ORDERS["error"], limits, thorough=False)
    return tuple(_point(problem, picks) for picks in (*points, last))


def within(points: Sequence[Point], budgets: Budgets) -> Point | None:
    """The fastest of a front that keeps other budgets; None where none does."""
    limits = budgets.limits()
    fitting = [
        point
        for point in points
        if all(keeps(getattr(point.totals, name), limit) for name, limit in limits.items())
    ]
    return min(fitting, key=lambda point: (point.totals.time_us, point.totals.error), default=None)


def _point(problem: Problem, picks: Picks) -> Point:
    return Point(totals=problem.totals(picks), labels=problem.labels(picks))
