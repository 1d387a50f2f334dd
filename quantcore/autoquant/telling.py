"""What plans say, as plain values: one plan, two beside each other, and why a layer takes what.

    shown(plan)          totals, counts, uniform plans, other budgets, and what ran end to end
    compared(one, two)   the layers that differ, with the costs of both
    explained(plan, l)   a layer's candidates, and what speaks against each

Values are those of JSON; orchestrator/plan_printing.py makes tables of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantcore.autoquant.choice import Budgets, Chosen
from quantcore.autoquant.document import Plan
from quantcore.autoquant.finalists import kernel_of
from quantcore.autoquant.options import Option, Profile
from quantcore.autoquant.program import keeps
from quantcore.errors import SpecError

Facts = dict[str, Any]
Costs = Mapping[str, float]  # time_us, num_bytes and error, with the whole model's correction

BUDGETS = {"time_us": "time", "num_bytes": "bytes", "error": "error"}


def shown(plan: Plan) -> Facts:
    choice = plan.choice
    counts = Counter(plan.labels().values())
    return {
        **_made_for(plan),
        "totals": asdict(choice.totals),
        "linears": dict(sorted(counts.items())),
        "uniforms": [asdict(uniform) for uniform in choice.uniforms],
        "ends": [asdict(end) for end in plan.ends],
        "front": [asdict(point.totals) for point in plan.front],
    }


def errors_told(plan: Plan) -> str:
    """What its errors are."""
    if plan.checks:
        return "errors are in nats a token, by a check of the whole model"
    return "errors are the linears' relative ones, added up: no whole model was checked"


def times_told(plan: Plan) -> str:
    """What its times are, and how far they were off."""
    kept = next((end for end in plan.ends if end.kept), None)
    if kept is None:
        return "times are the linears' own, added up: nothing of this plan was run end to end"
    took = f"the whole model was run end to end: {kept.measured_us:.6g} us"
    if kept.predicted_us is None:
        return took
    off = kept.predicted_us / kept.measured_us - 1
    return f"{took}, predicted as {kept.predicted_us:.6g} ({off:+.1%})"


def compared(one: Plan, other: Plan) -> Facts:
    """Two plans side by side, [one, other]; of their layers, those whose choice differs.

    Layers of the same linears are compared whole. Where plans join linears in other ways, each
    linear has a line, with figures only where a layer is it alone.
    """
    facts = [_made_for(one), _made_for(other)]
    pairs = list(_paired(one, other))
    return {
        **{key: [fact[key] for fact in facts] for key in facts[0]},
        "same_hardware": one.hardware == other.hardware,
        "same_profile": one.profile == other.profile,
        "totals": [asdict(one.choice.totals), asdict(other.choice.totals)],
        "layers": [
            {
                "layer": pair.name,
                "candidate": [side.label for side in pair.sides],
                "tie": pair.tie,
                **{key: [side.costs.get(key) for side in pair.sides] for key in BUDGETS},
            }
            for pair in pairs
            if pair.differs
        ],
        "layers_alike": sum(not pair.differs for pair in pairs),
    }


def explained(plan: Plan, name: str) -> Facts:
    """Why a layer, by its name or a linear's, takes what it takes. Raises SpecError for another."""
    at = next(
        (
            at
            for at, layer in enumerate(plan.choice.layers)
            if name == layer.layer or name in layer.linears
        ),
        None,
    )
    if at is None:
        raise SpecError(
            f"the plan has no layer '{name}': write one of its {len(plan.choice.layers)}, as "
            f"'{plan.choice.layers[0].layer}'"
        )
    chosen = plan.choice.layers[at]
    options = plan.measured[at].options if plan.measured else (chosen.option,)
    in_order = sorted(options, key=lambda option: (option.time.time_us, option.label))
    second = chosen.runner_up
    return {
        **_made_for(plan),
        "layer": chosen.layer,
        "linears": list(chosen.linears),
        "candidate": chosen.option.label,
        "totals": asdict(plan.choice.totals),
        "share_of_time": chosen.option.time.time_us / (plan.choice.totals.time_us or 1.0),
        "options": [
            {
                "candidate": option.label,
                **asdict(option.time),
                **{key: cost for key, cost in _costs(plan, option).items() if key != "time_us"},
                "verdict": _verdict(plan, chosen, option),
            }
            for option in in_order
        ],
        "all_options": bool(plan.measured),
        "factors": {
            kernel: plan.factors[kernel]
            for kernel in dict.fromkeys(kernel_of(option.label) for option in in_order)
            if kernel in plan.factors
        },
        "runner_up": None if second is None else asdict(second),
        "ties": list(chosen.ties),
    }


def _made_for(plan: Plan) -> Facts:
    return {
        "hardware": plan.hardware.label(),
        "profile": _profile(plan.profile),
        "objective": plan.choice.objective,
        "budgets": _budgets(plan.choice.budgets),
    }


def _budgets(budgets: Budgets) -> dict[str, float]:
    return {BUDGETS[name]: limit for name, limit in budgets.limits().items()}


def _profile(profile: Profile) -> str:
    calls = " + ".join(f"{profile.calls[t]:g} x {t} tokens" for t in sorted(profile.calls))
    return f"{profile.name} ({calls})"


@dataclass(frozen=True, slots=True)
class _Side:
    """What one plan says of a layer, or of a linear."""

    label: str | None = None  # None: nothing
    ties: tuple[str, ...] = ()
    costs: Costs = field(default_factory=dict)  # none of a linear that shares a layer


@dataclass(frozen=True, slots=True)
class _Pair:
    name: str
    sides: tuple[_Side, _Side]

    @property
    def differs(self) -> bool:
        return self.sides[0].label != self.sides[1].label

    @property
    def tie(self) -> bool:
        return self.sides[1].label in self.sides[0].ties


def _paired(one: Plan, other: Plan) -> Iterator[_Pair]:
    """In the order of the first plan, then what only the second has."""
    plans = (one, other)
    mine, theirs = ({layer.linears: layer for layer in plan.choice.layers} for plan in plans)
    by_linear = [
        {linear: layer for layer in plan.choice.layers for linear in layer.linears}
        for plan in plans
    ]
    alone: dict[str, None] = {}
    for linears in {**mine, **theirs}:
        if linears in mine and linears in theirs:
            sides = _side(one, mine[linears]), _side(other, theirs[linears])
            yield _Pair(mine[linears].layer, sides)
        else:
            alone |= dict.fromkeys(linears)
    for linear in alone:
        first, second = (of.get(linear) for of in by_linear)
        yield _Pair(linear, (_side(one, first, joined=False), _side(other, second, joined=False)))


def _side(plan: Plan, layer: Chosen | None, joined: bool = True) -> _Side:
    if layer is None:
        return _Side()
    costs = _costs(plan, layer.option) if joined or len(layer.linears) == 1 else {}
    return _Side(layer.option.label, layer.ties, costs)


def _costs(plan: Plan, option: Option) -> Costs:
    return {
        "time_us": option.time.time_us,
        "num_bytes": option.num_bytes,
        "error": plan.choice.correction * option.error,
    }


def _verdict(plan: Plan, chosen: Chosen, option: Option) -> str:
    """What speaks against an option, all other layers as they are."""
    if option == chosen.option:
        return "chosen"
    mine, its = _costs(plan, chosen.option), _costs(plan, option)
    more = {key: its[key] - mine[key] for key in BUDGETS}
    totals = asdict(plan.choice.totals)
    limits = plan.choice.budgets.limits()
    over = {
        key: totals[key] + more[key] - limit
        for key, limit in limits.items()
        if not keeps(totals[key] + more[key], limit)
    }
    if over:
        by = " and ".join(f"of {BUDGETS[key]} by {amount:.4g}" for key, amount in over.items())
        return f"over the budget {by}"
    tied = option.label in chosen.ties
    words = {"time_us": "slower", "error": "more error", "num_bytes": "more bytes"}
    first, second = (
        ("time_us", "error") if plan.choice.objective == "time" else ("error", "time_us")
    )
    order = (*(key for key in (first, second) if key != "time_us" or not tied), "num_bytes")
    because = next((words[key] for key in order if more[key] > 0), None)
    if not tied:
        return because or "the same in all, with a later name"
    if because is None and more["time_us"] > 0:
        return "slower, by less than another run might find"
    return f"a tie in time; {because or 'the same otherwise, with a later name'}"
