"""What plans say, in plain lines: why a layer takes what it takes, and how two plans differ."""

from quantcore.autoquant.choice import Chosen, Totals
from quantcore.autoquant.document import End, Plan
from quantcore.autoquant.options import Profile
from quantcore.errors import SpecError


def diff(one: Plan, other: Plan) -> list[str]:
    """What differs, from one to the other, in plain lines; none where both say the same."""
    lines = []
    if one.hardware != other.hardware:
        lines.append(f"hardware: {one.hardware.label()} -> {other.hardware.label()}")
    if one.profile != other.profile:
        lines.append(f"profile: {_profile(one.profile)} -> {_profile(other.profile)}")
    if one.choice.totals != other.choice.totals:
        lines.append(f"in total: {_totals(one.choice.totals)} -> {_totals(other.choice.totals)}")
    mine, theirs = one.labels(), other.labels()
    tied = {linear: layer.ties for layer in one.choice.layers for linear in layer.linears}
    for linear in sorted(mine.keys() | theirs.keys()):
        before, after = mine.get(linear, "nothing"), theirs.get(linear, "nothing")
        if before != after:
            tie = ", a tie" if after in tied.get(linear, ()) else ""
            lines.append(f"{linear}: {before} -> {after}{tie}")
    return lines


def explain(plan: Plan, layer: str) -> list[str]:
    """Why a layer, by its name or a linear's, takes what it takes. Else raises SpecError."""
    for chosen in plan.choice.layers:
        if layer == chosen.layer or layer in chosen.linears:
            return _explained(plan, chosen)
    raise SpecError(
        f"layer: the plan has no '{layer}': write one of its {len(plan.choice.layers)} layers, "
        f"as '{plan.choice.layers[0].layer}'"
    )


def _explained(plan: Plan, chosen: Chosen) -> list[str]:
    option, totals, second = chosen.option, plan.choice.totals, chosen.runner_up
    share = option.time.time_us / totals.time_us if totals.time_us else 0.0
    lines = [
        f"{chosen.layer}: {option.label}",
        f"time: {option.time.time_us:.6g} us ({option.time.low_us:.6g} to "
        f"{option.time.high_us:.6g}) on {_profile(plan.profile)}, {share:.1%} of all",
        f"bytes: {option.num_bytes}",
        f"error: {plan.choice.correction * option.error:.6g} of {totals.error:.6g}",
    ]
    if len(chosen.linears) > 1:
        lines.insert(1, f"one choice for {', '.join(chosen.linears)}")
    if second is None:
        lines.append("runner-up: none, nothing else keeps the budgets")
    else:
        lines.append(
            f"runner-up: {second.label}, by {second.more_us:+.6g} us, "
            f"{second.more_bytes:+d} bytes, {second.more_error:+.6g} error"
        )
    if chosen.ties:
        lines.append(f"ties within the measurements' noise: {', '.join(chosen.ties)}")
    return lines + proven(plan)


def proven(plan: Plan) -> list[str]:
    """What the whole model took, as far as plans were run end to end."""
    return [f"{'kept' if end.kept else 'not kept'}, {_end(end)}" for end in plan.ends]


def _end(end: End) -> str:
    predicted = "" if end.predicted_us is None else f" (predicted {end.predicted_us:.6g})"
    return (
        f"{end.plan}: {end.measured_us:.6g} us end to end, {end.low_us:.6g} to "
        f"{end.high_us:.6g}{predicted}"
    )


def _profile(profile: Profile) -> str:
    calls = " + ".join(f"{profile.calls[t]:g} x {t} tokens" for t in sorted(profile.calls))
    return f"{profile.name} ({calls})"


def _totals(totals: Totals) -> str:
    return f"{totals.time_us:.6g} us, {totals.num_bytes} bytes, error {totals.error:.6g}"
