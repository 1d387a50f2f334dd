"""What another device is to be asked for: candidates, bytes and contests, with no device here.

A fleet's driver has spots (costs.py) and no GPU. What a weight takes in memory it reads off tensors
that have shapes alone; what it has no time of is said by a bench that can't time:

    spots of one shape -> is all of it known? -> else a worker's `costs.measured`, and asked again

A race that was begun with some times known may find others to be wanting, so it is asked until no
more is. Layers to choose from are then made of what is known.
"""

from collections.abc import Iterable, Mapping, Sequence

from quantcore.autoquant.candidates import (
    Candidate,
    candidates_of,
    offers,
    refused,
    worth_timing,
)
from quantcore.autoquant.costs import Spot, measured
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.options import Layer, Profile
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.timing import Bench
from quantcore.schemes import Scheme

Features = tuple[int, int]  # outputs, inputs


class NotTimedError(Exception):
    """A time is wanted that nobody has."""


class Asked(Bench):
    """A bench without a device."""

    def __init__(self) -> None:
        super().__init__("meta")

    def stopwatch(self, product: Product) -> Stopwatch:
        raise NotTimedError


def legal(
    shapes: Sequence[Features], schemes: Iterable[Scheme], dtype: str, device: str
) -> tuple[Candidate, ...]:
    """What linears of one input that take one choice may become on a kind of device."""
    rows, columns = sum(rows for rows, _ in shapes), shapes[0][1]
    offered = worth_timing(offers(candidates_of(schemes), (rows, columns), dtype, device))
    return tuple(
        offer.candidate
        for offer in offered
        if not any(refused(offer.candidate, shape, dtype, device) for shape in shapes)
    )


def spot(
    linears: Mapping[str, Features],
    offered: tuple[Candidate, ...],
    errors: Mapping[str, Mapping[Scheme, float]],
    dtype: str,
    profile: Profile,
) -> Spot:
    """Where one choice is made, its errors those of its linears added up."""
    names = tuple(linears)
    owner = names[0].rpartition(".")[0]
    short = "+".join(name.rpartition(".")[2] for name in names)
    schemes = dict.fromkeys(of.scheme for of in offered if of.scheme is not None)
    return Spot(
        name=f"{owner}.{short}".lstrip("."),
        linears=names,
        rows=sum(rows for rows, _ in linears.values()),
        columns=next(iter(linears.values()))[1],
        dtype=dtype,
        profile=profile,
        offered=offered,
        errors={scheme: sum(errors[name][scheme] for name in names) for scheme in schemes},
    )


def contests(spots: Iterable[Spot]) -> list[tuple[Spot, ...]]:
    """Spots of one shape and the same candidates, which race once."""
    alike: dict[tuple[object, ...], list[Spot]] = {}
    for one in spots:
        key = (one.rows, one.columns, one.dtype, one.offered)
        alike.setdefault(key, []).append(one)
    return [tuple(these) for these in alike.values()]


def layers(
    spots: Sequence[Spot],
    factors: Mapping[Scheme, float],
    known: Mapping[Product, Timing],
    effort: Effort,
) -> list[Layer] | None:
    """To choose from, by what is known; None where that is not enough."""
    try:
        found, _ = measured(spots, factors, known, Asked(), effort)
    except NotTimedError:
        return None
    return found
