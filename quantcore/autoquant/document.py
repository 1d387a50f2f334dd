"""plan-<hardware>.json: what was chosen, what it should cost, and what else there was.

    {"version": 1,
     "hardware": {...}, "profile": {...}, "objective": "time", "budgets": {...}, "correction": 1.0,
     "totals": {"time_us": ..., "num_bytes": ..., "error": ...},
     "layers": [one a line, by name], "uniforms": [one a line], "front": [one a line],
     "checks": [one a line], "ends": [one a line], "factors": {...},
     "options": [one layer a line]}

Labels stand in the front and in the options as numbers of "candidates"; in the front, one for each
layer in the order of "layers". Options are what each layer could take, [number, time_us, low_us,
high_us, num_bytes, error]: with them another budget is chosen for without new measurement. Options
and shapes may be left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.choice import (
    Budgets,
    Choice,
    Chosen,
    Objective,
    RunnerUp,
    Totals,
    Uniform,
)
from quantcore.autoquant.front import Point
from quantcore.autoquant.measurements import HardwareKind
from quantcore.autoquant.options import Layer, Option, Profile, Time
from quantcore.errors import DAMAGE, ResourceError, SpecError, why_damaged

VERSION = 1
CHOSEN = "chosen"  # the plan itself, among what was checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the whole model moved under a plan, and what the plan's errors had added up to.

    Errors of a scheme were scaled by the check of that scheme alone: its own is no prediction.
    """

    plan: str  # CHOSEN, or the scheme that all linears had
    summed: float  # their errors, before anything scaled them
    predicted: float | None
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What the whole model took end to end under a plan, once for all calls of the profile."""

    plan: str  # a uniform plan's label, "dense", or how it was chosen
    predicted_us: float | None  # from its linears and the dense model's rest
    measured_us: float
    low_us: float
    high_us: float
    kept: bool = False  # this is the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    hardware: HardwareKind
    profile: Profile
    choice: Choice
    front: tuple[Point, ...]
    checks: tuple[Check, ...] = ()  # none: errors add up in a unit of their own
    ends: tuple[End, ...] = ()  # none: times are those of linears alone
    # by kernel: what its times were scaled by, from the ends; options and totals are scaled
    factors: Mapping[str, float] = field(default_factory=dict)
    measured: tuple[Layer, ...] = ()  # by name: what was chosen from
    shapes: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  # by linear: (rows, columns)

    def labels(self) -> dict[str, str]:
        """By linear, the label of what it becomes."""
        return {
            linear: layer.option.label for layer in self.choice.layers for linear in layer.linears
        }


def file_name(kind: HardwareKind) -> str:
    return "plan-" + "".join(c if c.isalnum() else "_" for c in kind.full_name()) + ".json"


def written(plan: Plan) -> str:
    choice = plan.choice
    used = {label for point in plan.front for label in point.labels}
    used |= {option.label for layer in plan.measured for option in layer.options}
    candidates = sorted(used)
    number = {label: at for at, label in enumerate(candidates)}
    profile = {
        "name": plan.profile.name,
        "calls": {str(tokens): plan.profile.calls[tokens] for tokens in sorted(plan.profile.calls)},
    }
    facts = {
        "version": VERSION,
        "hardware": asdict(plan.hardware),
        "profile": profile,
        "objective": choice.objective,
        "budgets": asdict(choice.budgets),
        "correction": choice.correction,
        "totals": asdict(choice.totals),
        "factors": dict(plan.factors),
        "candidates": candidates,
    }
    lists = {
        "layers": [_layer(layer, plan.shapes) for layer in choice.layers],
        "uniforms": [asdict(uniform) for uniform in choice.uniforms],
        "front": [
            {**asdict(point.totals), "picks": [number[label] for label in point.labels]}
            for point in plan.front
        ],
        "checks": [asdict(check) for check in plan.checks],
        "ends": [asdict(end) for end in plan.ends],
        "options": [_options(layer, number) for layer in plan.measured],
    }
    rows = [f"{json.dumps(name)}: {_dumped(value)}" for name, value in facts.items()]
    rows += [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(_dumped, entries)) + "\n]"
        for name, entries in lists.items()
    ]
    return "{" + ",\n".join(rows) + "}\n"


def parse(text: str) -> Plan:
    """What `written` gave. Raises SpecError for what is no plan, or does not add up."""
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise SpecError(
                f"plan: version {document['version']} where this reads {VERSION}: plan anew"
            )
        plan = _plan(document)
        _check(plan)
    except DAMAGE as error:
        why = why_damaged(error)
        raise SpecError(f"plan: damaged ({why}): plan anew") from None
    return plan


def refuse_other_hardware(plan: Plan, kind: HardwareKind, allowed: bool = False) -> None:
    """Raises ResourceError for a plan that was made on another kind, unless that is allowed.

    Other software on the same hardware is another kind: kernels may be faster by then.
    """
    if allowed or plan.hardware == kind:
        return
    raise ResourceError(
        f"plan: made for {plan.hardware.label()}, and this is {kind.label()}: plan anew here, or "
        "allow a plan of other hardware"
    )


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _layer(chosen: Chosen, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        "layer": chosen.layer,
        "linears": list(chosen.linears),
        "shapes": [shapes.get(linear) for linear in chosen.linears],
        "candidate": chosen.option.label,
        **asdict(chosen.option.time),
        "num_bytes": chosen.option.num_bytes,
        "error": chosen.option.error,
        "ties": list(chosen.ties),
        "runner_up": None if chosen.runner_up is None else asdict(chosen.runner_up),
    }


def _options(layer: Layer, number: Mapping[str, int]) -> dict[str, Any]:
    options = [
        [number[o.label], *asdict(o.time).values(), o.num_bytes, o.error] for o in layer.options
    ]
    return {"of": layer.name, "options": options}


def _plan(document: Mapping[str, Any]) -> Plan:
    profile = document["profile"]
    candidates = [candidate_of(label).label() for label in document["candidates"]]
    layers = tuple(_read_layer(entry) for entry in document["layers"])
    return Plan(
        hardware=HardwareKind(**document["hardware"]),
        profile=Profile(
            name=_text(profile["name"]),
            calls={int(tokens): _number(of) for tokens, of in profile["calls"].items()},
        ),
        choice=Choice(
            objective=_objective(document["objective"]),
            budgets=Budgets(**document["budgets"]),
            correction=_number(document["correction"]),
            layers=layers,
            totals=_read_totals(document["totals"]),
            uniforms=tuple(
                Uniform(
                    label=candidate_of(entry["label"]).label(),
                    totals=_read_totals(entry["totals"]),
                    fits=bool(entry["fits"]),
                )
                for entry in document["uniforms"]
            ),
        ),
        front=tuple(_point(entry, candidates) for entry in document["front"]),
        checks=tuple(_read_check(entry) for entry in document.get("checks", ())),
        ends=tuple(_read_end(entry) for entry in document.get("ends", ())),
        factors={
            _text(kernel): _number(factor) for kernel, factor in document.get("factors", {}).items()
        },
        measured=_measured(document["options"], layers, candidates),
        shapes={
            linear: _shape(shape)
            for entry in document["layers"]
            for linear, shape in zip(entry["linears"], entry["shapes"], strict=True)
            if shape is not None
        },
    )


def _read_layer(entry: Mapping[str, Any]) -> Chosen:
    second = entry["runner_up"]
    time = Time(**{one.name: _number(entry[one.name]) for one in fields(Time)})
    return Chosen(
        layer=_text(entry["layer"]),
        linears=tuple(_text(name) for name in entry["linears"]),
        option=Option(
            candidate=candidate_of(entry["candidate"]),
            time=time,
            num_bytes=_whole(entry["num_bytes"]),
            error=_number(entry["error"]),
        ),
        ties=tuple(candidate_of(label).label() for label in entry["ties"]),
        runner_up=None
        if second is None
        else RunnerUp(
            label=candidate_of(second["label"]).label(),
            more_us=_number(second["more_us"]),
            more_bytes=_whole(second["more_bytes"]),
            more_error=_number(second["more_error"]),
        ),
    )


def _read_check(entry: Mapping[str, Any]) -> Check:
    predicted = entry["predicted"]
    return Check(
        plan=_text(entry["plan"]),
        summed=_number(entry["summed"]),
        predicted=None if predicted is None else _number(predicted),
        measured=_number(entry["measured"]),
    )


def _read_end(entry: Mapping[str, Any]) -> End:
    predicted = entry["predicted_us"]
    return End(
        plan=_text(entry["plan"]),
        predicted_us=None if predicted is None else _number(predicted),
        measured_us=_number(entry["measured_us"]),
        low_us=_number(entry["low_us"]),
        high_us=_number(entry["high_us"]),
        kept=bool(entry["kept"]),
    )


def _measured(
    entries: Sequence[Mapping[str, Any]], layers: Sequence[Chosen], candidates: Sequence[str]
) -> tuple[Layer, ...]:
    if entries and layers and [e["of"] for e in entries] != [layer.layer for layer in layers]:
        raise ValueError("options: they are not those of the layers, one line for each")
    return tuple(
        Layer(
            name=chosen.layer,
            linears=chosen.linears,
            options=tuple(_read_option(option, candidates) for option in entry["options"]),
        )
        for entry, chosen in zip(entries, layers, strict=False)
    )


def _read_option(entry: Sequence[Any], candidates: Sequence[str]) -> Option:
    number, time_us, low_us, high_us, num_bytes, error = entry
    return Option(
        candidate=candidate_of(_numbered(number, candidates)),
        time=Time(time_us=_number(time_us), low_us=_number(low_us), high_us=_number(high_us)),
        num_bytes=_whole(num_bytes),
        error=_number(error),
    )


def _point(entry: Mapping[str, Any], candidates: Sequence[str]) -> Point:
    labels = tuple(_numbered(pick, candidates) for pick in entry["picks"])
    return Point(totals=_read_totals(entry), labels=labels)


def _numbered(number: Any, candidates: Sequence[str]) -> str:
    at = _whole(number)
    if not 0 <= at < len(candidates):
        raise ValueError(f"{at} is no candidate's number")
    return candidates[at]


def _shape(entry: Sequence[Any]) -> tuple[int, int]:
    rows, columns = map(_whole, entry)
    if min(rows, columns) < 1:
        raise ValueError(f"{entry} is no linear's shape")
    return rows, columns


def _read_totals(entry: Mapping[str, Any]) -> Totals:
    return Totals(
        time_us=_number(entry["time_us"]),
        num_bytes=_whole(entry["num_bytes"]),
        error=_number(entry["error"]),
    )


def _objective(name: Any) -> Objective:
    if name not in get_args(Objective):
        raise ValueError(f"objective: {name!r} is not {' or '.join(get_args(Objective))}")
    objective: Objective = name
    return objective


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    number: float = value
    return number


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value:
        raise ValueError(f"{value!r} is not a name")
    return value


def _check(plan: Plan) -> None:
    """A document may have been written by hand: what it says in two places must agree."""
    choice = plan.choice
    linears = [linear for layer in choice.layers for linear in layer.linears]
    if not linears or len(set(linears)) < len(linears):
        raise ValueError("layers: none, or a linear that stands in two of them")
    sums = Totals(
        time_us=math.fsum(layer.option.time.time_us for layer in choice.layers),
        num_bytes=sum(layer.option.num_bytes for layer in choice.layers),
        error=choice.correction * math.fsum(layer.option.error for layer in choice.layers),
    )
    for one in fields(Totals):
        said, found = getattr(choice.totals, one.name), getattr(sums, one.name)
        if not math.isclose(said, found, rel_tol=1e-6, abs_tol=1e-300):
            raise ValueError(f"totals.{one.name}: {said} where the layers add up to {found}")
    if any(len(point.labels) != len(choice.layers) for point in plan.front):
        raise ValueError("front: a point has not one candidate for each layer")
    for layer, chosen in zip(plan.measured, choice.layers, strict=False):
        if chosen.option not in layer.options:
            raise ValueError(f"options: '{layer.name}' has none with what it was chosen for")
