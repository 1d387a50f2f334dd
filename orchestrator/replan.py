"""Another budget, chosen for from what a plan holds: no new measurement.

A plan's front has the best plan at so many times, a step apart. With the options of each layer the
choice is made anew instead: exact at any budget, and with runner-up, ties and uniform plans told.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from quantcore.autoquant.choice import Budgets, Objective
from quantcore.autoquant.confirming import choose_beside
from quantcore.autoquant.document import CHOSEN, Plan
from quantcore.autoquant.front import front
from quantcore.errors import SpecError

_NAMES = {"time_us": "time_us", "bytes": "num_bytes", "error": "error"}
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def budgets_of(words: Iterable[str]) -> Budgets:
    """From `error=0.5`, `bytes=4.5GiB`, `time_us=900`. Raises SpecError for others."""
    limits: dict[str, float] = {}
    for word in words:
        name, separator, amount = word.partition("=")
        found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?((?:[KMGT]iB)?)", amount)
        unit = found[2] if found else ""
        if name not in _NAMES or not separator or not found or (unit and name != "bytes"):
            raise SpecError(
                f"--budget: cannot read '{word}': write error=0.5, bytes=4.5GiB or time_us=900"
            )
        if _NAMES[name] in limits:
            raise SpecError(f"--budget: {name} stands twice: keep one")
        limits[_NAMES[name]] = float(found[1]) * _UNITS[unit]
    return Budgets(**limits)


def chosen_again(plan: Plan, budgets: Budgets, objective: Objective | None = None) -> Plan:
    """Raises SpecError where no plan keeps the budgets, or the document has too little to say."""
    if not plan.measured:
        raise SpecError("the plan does not tell what else was measured: plan anew")
    choice = choose_beside(
        plan.measured, objective or plan.choice.objective, budgets, plan.choice.correction
    )
    points = plan.front
    before = plan.choice.budgets.num_bytes, plan.choice.correction
    if (budgets.num_bytes, choice.correction) != before:
        points = front(plan.measured, budgets.num_bytes, choice.correction)
    again = replace(plan, choice=choice, front=points)
    if again.labels() == plan.labels():
        return again
    # what was measured of the other choice says nothing of this one
    checks = tuple(check for check in plan.checks if check.plan != CHOSEN)
    ends = tuple(replace(end, kept=False) for end in plan.ends if not end.kept)
    return replace(again, checks=checks, ends=ends)
