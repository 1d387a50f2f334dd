"""Where choices are made: linears, what they may become, and how far that moves their outputs.

Linears that are joined (joining.py) take one choice and are timed as the one product that they
become; their errors add up. What a scheme's errors are scaled by is found by the whole model under
that scheme alone: what it moved, by what the linears' errors had added up to (divergence.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantcore.autoquant.candidates import (
    Candidate,
    candidates_of,
    offers,
    refused,
    worth_timing,
)
from quantcore.autoquant.choice import Choice
from quantcore.autoquant.document import Check
from quantcore.autoquant.options import Profile
from quantcore.schemes import Scheme

Features = tuple[int, int]  # outputs, inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where one choice is made: a linear, or several that are joined."""

    name: str
    linears: tuple[str, ...]
    rows: int  # of all
    columns: int
    dtype: str
    profile: Profile
    offered: tuple[Candidate, ...]
    errors: Mapping[Scheme, float]  # of all linears together


def legal(
    shapes: Sequence[Features], schemes: Iterable[Scheme], dtype: str, device: str
) -> tuple[Candidate, ...]:
    """What linears of one input that take one choice may become on a kind of device."""
    rows, columns = sum(rows for rows, _ in shapes), shapes[0][1]
    offered = worth_timing(offers(candidates_of(schemes), (rows, columns), dtype, device))
    return tuple(
        offer.candidate
        for offer in offered
        if not any(refused(offer.candidate, shape, dtype, device) for shape in set(shapes))
    )


def spot(
    linears: Mapping[str, Features],
    offered: tuple[Candidate, ...],
    errors: Mapping[str, Mapping[Scheme, float]],
    dtype: str,
    profile: Profile,
) -> Spot:
    names = tuple(linears)
    owner = names[0].rpartition(".")[0]
    short = "+".join(name.rpartition(".")[2] for name in names)
    return Spot(
        name=f"{owner}.{short}".lstrip("."),
        linears=names,
        rows=sum(rows for rows, _ in linears.values()),
        columns=next(iter(linears.values()))[1],
        dtype=dtype,
        profile=profile,
        offered=offered,
        errors={of: sum(errors[name][of] for name in names) for of in schemes_in(offered)},
    )


def schemes_in(offered: Iterable[Candidate]) -> list[Scheme]:
    return list({of.scheme: None for of in offered if of.scheme is not None})


def contests(spots: Iterable[Spot]) -> list[tuple[Spot, ...]]:
    """Spots of one shape, the same calls and the same candidates, which race once."""
    alike: dict[tuple[object, ...], list[Spot]] = {}
    for one in spots:
        calls = tuple(sorted(one.profile.calls.items()))
        key = (one.rows, one.columns, one.dtype, calls, one.offered)
        alike.setdefault(key, []).append(one)
    return [tuple(these) for these in alike.values()]


def takers(spots: Sequence[Spot]) -> dict[Scheme, list[str]]:
    """By scheme, the linears that may take it."""
    return {
        scheme: [name for of in spots if scheme in of.errors for name in of.linears]
        for scheme in {scheme: None for of in spots for scheme in of.errors}
    }


def scales(
    spots: Sequence[Spot], moved: Mapping[Scheme, float]
) -> tuple[dict[Scheme, float], list[Check]]:
    """What each scheme's errors are scaled by, from what the whole model moved under it alone."""
    factors, checks = {}, []
    for scheme, measured in moved.items():
        summed = sum(of.errors.get(scheme, 0.0) for of in spots)
        if summed > 0:
            factors[scheme] = measured / summed
        label = scheme.label()
        checks.append(Check(plan=label, summed=summed, predicted=None, measured=measured))
    return factors, checks


def summed(choice: Choice, spots: Sequence[Spot]) -> float:
    """The errors of what was chosen, before anything scaled them."""
    errors = {of.name: of.errors for of in spots}
    schemes = {layer.layer: layer.option.candidate.scheme for layer in choice.layers}
    return sum(errors[name][scheme] for name, scheme in schemes.items() if scheme is not None)
