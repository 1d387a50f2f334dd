"""One candidate for each layer: least time within budgets of bytes and error, or least error.

Ties are broken by error, then bytes, then label. Labels decide within a layer, and among layers
whose options cost the same, those with earlier names take the earlier labels.

A uniform plan is one candidate wherever it is legal and dense elsewhere. Each is a point of the
same program, and each that fits is compared with the answer once more: no uniform plan that keeps
the budgets is better than what is chosen. Better in the time that options are compared by, where
those that no measurement tells apart are equal (options.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from quantcore.autoquant.candidates import DENSE_LABEL
from quantcore.autoquant.options import Layer, Option, compared_us, may_tie
from quantcore.autoquant.program import TOLERANCE, Picks, Program, keeps
from quantcore.errors import SpecError

Objective = Literal["time", "error"]

# What is least first, then among equals; COMPARED is what ties share, "time_us" what was measured
COMPARED = "compared_us"
ORDERS: dict[Objective, tuple[str, ...]] = {
    "time": (COMPARED, "error", "num_bytes"),
    "error": ("error", COMPARED, "num_bytes"),
}
_WORDS = {"time_us": "microseconds", "num_bytes": "bytes", "error": "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The most that a whole plan may have; None: anything."""

    num_bytes: float | None = None
    error: float | None = None
    time_us: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not 0 <= limit < math.inf:
                raise SpecError(f"budget of {_WORDS[name]}: {limit}: write a number from 0")

    def limits(self) -> dict[str, float]:
        limits = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    time_us: float
    num_bytes: int
    error: float  # with the whole model's correction


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """Of the other options that leave the plan within its budgets, the one that costs least."""

    label: str
    more_us: float
    more_bytes: int
    more_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    layer: str
    linears: tuple[str, ...]
    option: Option
    ties: tuple[str, ...]  # labels of options as fast for all that was measured: see `may_tie`
    runner_up: RunnerUp | None  # None: no other option fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    label: str
    totals: Totals
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    objective: Objective
    budgets: Budgets
    correction: float
    layers: tuple[Chosen, ...]  # by name
    totals: Totals
    uniforms: tuple[Uniform, ...]  # by label


class Problem:
    """Layers with their costs, in the order that decides ties: layers by name, options by label.

    `correction` is what the sum of all errors is multiplied by: 1 until a whole model was checked.
    """

    def __init__(self, layers: Sequence[Layer], correction: float = 1.0) -> None:
        names = [layer.name for layer in layers]
        if not layers or len(set(names)) < len(names):
            raise SpecError("layers: write one or more, each with a name of its own")
        if not 0 < correction < math.inf:
            raise SpecError(f"correction: {correction}: write a number above 0")
        self.correction = correction
        self.layers = sorted(layers, key=lambda layer: layer.name)
        self.options = [
            sorted(layer.options, key=lambda option: option.label) for layer in self.layers
        ]
        self.costs: dict[str, list[list[float]]] = {
            COMPARED: [compared_us(options) for options in self.options],
            "time_us": [[option.time.time_us for option in of] for of in self.options],
            "num_bytes": [[float(option.num_bytes) for option in of] for of in self.options],
            "error": [[correction * option.error for option in of] for of in self.options],
        }
        self._all = Program(self.costs)
        self._kept: dict[tuple[str, ...], list[list[int]]] = {}
        self._alike: dict[object, list[int]] = {}
        for layer, of in enumerate(self.options):
            key = tuple((o.label, o.time, o.num_bytes, o.error) for o in of)
            self._alike.setdefault(key, []).append(layer)

    def least(
        self, order: Sequence[str], limits: Mapping[str, float], *, thorough: bool = True
    ) -> Picks | None:
        """Which option each layer takes; None where nothing keeps the limits."""
        used = {name: self.costs[name] for name in (*order, *(n for n in limits if n not in order))}
        if tuple(used) not in self._kept:
            self._kept[tuple(used)] = [
                _undominated([costs[layer] for costs in used.values()])
                for layer in range(len(self.layers))
            ]
        kept = self._kept[tuple(used)]
        program = Program(
            {
                name: [[of[at] for at in options] for of, options in zip(costs, kept, strict=True)]
                for name, costs in used.items()
            }
        )
        found = program.least(order, limits, thorough=thorough)
        if found is None:
            return None
        return self._in_order([options[at] for options, at in zip(kept, found, strict=True)])

    def total(self, name: str, picks: Picks) -> float:
        return self._all.total(name, picks)

    def totals(self, picks: Picks) -> Totals:
        return Totals(
            time_us=self.total("time_us", picks),
            num_bytes=round(self.total("num_bytes", picks)),
            error=self.total("error", picks),
        )

    def fits(self, picks: Picks, limits: Mapping[str, float]) -> bool:
        return all(keeps(self.total(name, picks), limit) for name, limit in limits.items())

    def labels(self, picks: Picks) -> tuple[str, ...]:
        return tuple(of[at].label for of, at in zip(self.options, picks, strict=True))

    def uniforms(self) -> dict[str, Picks]:
        """By label; without those that leave a layer with nothing, where dense is no option."""
        places = [{option.label: at for at, option in enumerate(of)} for of in self.options]
        found = {}
        for label in sorted({label for of in places for label in of}):
            picks = [of.get(label, of.get(DENSE_LABEL)) for of in places]
            known = tuple(at for at in picks if at is not None)
            if len(known) == len(picks):
                found[label] = known
        return found

    def _in_order(self, picks: Sequence[int]) -> Picks:
        """Among layers that cost the same in all, the earlier labels go to the earlier names."""
        ordered = list(picks)
        for layers in self._alike.values():
            for layer, at in zip(layers, sorted(picks[layer] for layer in layers), strict=True):
                ordered[layer] = at
        return tuple(ordered)


def choose(
    layers: Sequence[Layer],
    objective: Objective,
    budgets: Budgets,
    correction: float = 1.0,
) -> Choice:
    """Raises SpecError where no plan keeps the budgets, with the one to raise and how far."""
    problem, limits = Problem(layers, correction), budgets.limits()
    picks = problem.least(ORDERS[objective], limits)
    if picks is None:
        raise SpecError(_infeasible(problem, limits))
    uniforms = problem.uniforms()
    first = ORDERS[objective][0]
    for uniform in uniforms.values():
        # a search that ended early may be past one
        better = problem.total(first, uniform) * (1 + TOLERANCE) < problem.total(first, picks)
        if better and problem.fits(uniform, limits):
            picks = uniform
    return _choice(problem, picks, objective, budgets)


def choose_as(
    layers: Sequence[Layer],
    objective: Objective,
    budgets: Budgets,
    labels: Mapping[str, str],
    correction: float = 1.0,
) -> Choice:
    """What was chosen otherwise: by layer, the label of one of its options. Budgets are told."""
    problem = Problem(layers, correction)
    picks = tuple(
        next(at for at, option in enumerate(of) if option.label == labels[layer.name])
        for layer, of in zip(problem.layers, problem.options, strict=True)
    )
    return _choice(problem, picks, objective, budgets)


def uniform_labels(layers: Sequence[Layer], label: str) -> dict[str, str]:
    """By layer, what it takes in the uniform plan of this label."""
    return {
        layer.name: label if any(of.label == label for of in layer.options) else DENSE_LABEL
        for layer in layers
    }


def ranked(layers: Sequence[Layer], choice: Choice, error: float) -> tuple[float, ...]:
    """What plans over these layers are compared by, in their objective's order: less is better.

    `error` is what is taken for the plan's, measured or predicted.
    """
    problem = Problem(layers)
    picks = tuple(
        [option.label for option in of].index(chosen.option.label)
        for of, chosen in zip(problem.options, choice.layers, strict=True)
    )
    return tuple(
        error if name == "error" else problem.total(name, picks)
        for name in ORDERS[choice.objective]
    )


def _choice(problem: Problem, picks: Picks, objective: Objective, budgets: Budgets) -> Choice:
    limits = budgets.limits()
    # a scheme's errors are those of the whole model under it: the correction is of mixed plans
    alone = problem if problem.correction == 1.0 else Problem(problem.layers)
    return Choice(
        objective=objective,
        budgets=budgets,
        correction=problem.correction,
        layers=_chosen(problem, picks, ORDERS[objective], limits),
        totals=problem.totals(picks),
        uniforms=tuple(
            Uniform(label=label, totals=alone.totals(of), fits=alone.fits(of, limits))
            for label, of in alone.uniforms().items()
        ),
    )


def _undominated(costs: Sequence[Sequence[float]]) -> list[int]:
    """One layer's options that no other beats or equals in every cost; of equals, the first."""
    of = list(zip(*costs, strict=True))
    return [
        at
        for at, mine in enumerate(of)
        if not any(
            all(a <= b for a, b in zip(others, mine, strict=True))
            and (others != mine or other < at)
            for other, others in enumerate(of)
            if other != at
        )
    ]


def _chosen(
    problem: Problem, picks: Picks, order: Sequence[str], limits: Mapping[str, float]
) -> tuple[Chosen, ...]:
    costs = problem.costs
    totals = {name: problem.total(name, picks) for name in costs}
    chosen = []
    for layer, (facts, options, mine) in enumerate(
        zip(problem.layers, problem.options, picks, strict=True)
    ):
        more = [
            {name: costs[name][layer][at] - costs[name][layer][mine] for name in costs}
            for at in range(len(options))
        ]
        fitting = [
            at
            for at in range(len(options))
            if at != mine
            and all(keeps(totals[name] + more[at][name], limit) for name, limit in limits.items())
        ]
        second = min(fitting, key=lambda at: ([more[at][n] for n in order], at), default=None)
        chosen.append(
            Chosen(
                layer=facts.name,
                linears=facts.linears,
                option=options[mine],
                ties=tuple(
                    option.label
                    for at, option in enumerate(options)
                    if at != mine and may_tie(options[mine].time, option.time)
                ),
                runner_up=None
                if second is None
                else RunnerUp(
                    label=options[second].label,
                    more_us=more[second]["time_us"],
                    more_bytes=round(more[second]["num_bytes"]),
                    more_error=more[second]["error"],
                ),
            )
        )
    return tuple(chosen)


def _infeasible(problem: Problem, limits: Mapping[str, float]) -> str:
    """The first budget that cannot be kept with those before it, and the least that can be had."""
    before: dict[str, float] = {}
    for name, limit in limits.items():
        picks = problem.least((name,), before)
        assert picks is not None
        least = problem.total(name, picks)
        if not keeps(least, limit):
            within = " and ".join(
                f"{_figure(other, kept)} {_WORDS[other]}" for other, kept in before.items()
            )
            within = f" within {within}" if within else ""
            return (
                f"budget of {_WORDS[name]}: no plan{within} has {_figure(name, limit)} or less: "
                f"write {_figure(name, least)} or more, the least that can be had"
            )
        before[name] = limit
    raise AssertionError("each budget can be kept with those before it, and all together cannot")


def _figure(name: str, amount: float) -> str:
    """Rounded up, so that it can be written as a budget."""
    if name == "num_bytes":
        return str(math.ceil(amount))
    short = f"{amount:.6g}"
    return short if float(short) >= amount else f"{amount * (1 + 1e-5):.6g}"
