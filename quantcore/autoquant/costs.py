"""What each linear of a model may become, with bytes, error and time: layers to choose from.

Linears that are joined (joining.py) take one choice and are timed as the one product that they
become; their errors add up. A scheme's errors are scaled once the whole model was checked under it
(divergence.py). A candidate that has lost its race is no option: another is faster for certain, and
costs no more in bytes or error. Its uniform plan is dense where it lost, or none if it lost all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from quantcore.autoquant.candidates import (
    Candidate,
    candidates_of,
    offers,
    refused,
    worth_timing,
)
from quantcore.autoquant.divergence import HeldOut, undone
from quantcore.autoquant.document import Check
from quantcore.autoquant.findings import Known
from quantcore.autoquant.keys import Keys
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.options import Layer, Option, Profile, profiled
from quantcore.autoquant.race import Effort
from quantcore.autoquant.sensitivity import output_errors
from quantcore.autoquant.timing import Bench, Contest, timed
from quantcore.errors import QuantizationError
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme


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


def spots_of(
    linears: Mapping[str, nn.Linear],
    joined: Iterable[tuple[str, ...]],
    schemes: Sequence[Scheme],
    recorder: Recorder,
    profile: Profile | None,
    known: Known,
    keys: Keys,
) -> list[Spot]:
    """In the order of the linears. Without a profile, each has what was recorded of it."""
    first = {names[0]: names for names in joined}
    others = {name for names in first.values() for name in names[1:]}
    return [
        _spot(
            {of: linears[of] for of in first.get(name, (name,))},
            schemes,
            recorder,
            profile,
            known,
            keys,
        )
        for name in linears
        if name not in others
    ]


def _spot(
    linears: Mapping[str, nn.Linear],
    schemes: Sequence[Scheme],
    recorder: Recorder,
    profile: Profile | None,
    known: Known,
    keys: Keys,
) -> Spot:
    names = tuple(linears)
    weights = [linear.weight for linear in linears.values()]
    dtype, device = str(weights[0].dtype).removeprefix("torch."), weights[0].device.type
    columns = weights[0].shape[1]
    shapes = {(len(weight), columns) for weight in weights}
    rows = sum(map(len, weights))
    offered = worth_timing(offers(candidates_of(schemes), (rows, columns), dtype, device))
    legal = tuple(
        offer.candidate
        for offer in offered
        if not any(refused(offer.candidate, shape, dtype, device) for shape in shapes)
    )
    asked = list({of.scheme: None for of in legal if of.scheme is not None})
    errors = dict.fromkeys(asked, 0.0)
    for name, linear in linears.items():
        findings = {scheme: keys.error(name, scheme) for scheme in asked}
        missing = [scheme for scheme in asked if findings[scheme] not in known]
        if missing:
            found = output_errors(name, linear.weight, recorder[name], missing)
            known.add({findings[scheme]: error for scheme, error in found.items()})
        for scheme in asked:
            errors[scheme] += known[findings[scheme]]
    owner = names[0].rpartition(".")[0]
    short = "+".join(name.rpartition(".")[2] for name in names)
    return Spot(
        name=f"{owner}.{short}".lstrip("."),
        linears=names,
        rows=rows,
        columns=columns,
        dtype=dtype,
        profile=profile or Profile(name="recorded", calls=dict(recorder[names[0]].calls)),
        offered=legal,
        errors=errors,
    )


def checked(
    model: nn.Module,
    spots: Sequence[Spot],
    recorder: Recorder,
    held_out: Callable[[], HeldOut],
    known: Known,
    keys: Keys,
) -> tuple[dict[Scheme, float], list[Check]]:
    """For each scheme, what its errors are scaled by, from the whole model under it alone."""
    factors, checks = {}, []
    for scheme in {scheme: None for spot in spots for scheme in spot.errors}:
        taking = [name for spot in spots if scheme in spot.errors for name in spot.linears]
        finding = keys.of_scheme(scheme, taking)
        if finding not in known:
            compared = held_out()
            with undone(model, taking):
                quantize_(
                    model,
                    scheme,
                    lambda name, _, taking=taking: name in taking,  # type: ignore[misc]
                    recorder=recorder if scheme.static else None,
                    inductor_settings=False,
                )
                known.add({finding: compared.divergence()})
        moved = known[finding]
        summed = sum(spot.errors.get(scheme, 0.0) for spot in spots)
        if summed > 0:
            factors[scheme] = moved / summed
        label = scheme.label()
        checks.append(Check(plan=label, summed=summed, predicted=None, measured=moved))
    return factors, checks


def measured(
    spots: Sequence[Spot],
    factors: Mapping[Scheme, float],
    known: Mapping[Product, Timing],
    bench: Bench,
    effort: Effort,
) -> tuple[list[Layer], dict[Product, Timing]]:
    """Layers to choose from, and what was timed for them: spots of one shape race once."""
    alike: dict[tuple[object, ...], list[Spot]] = {}
    for spot in spots:
        calls = tuple(sorted(spot.profile.calls.items()))
        key = (spot.rows, spot.columns, spot.dtype, calls, spot.offered)
        alike.setdefault(key, []).append(spot)
    contests = [_contest(these, factors, bench) for these in alike.values()]
    wanted = [of for contest in contests for of in contest.products()]
    bench.prepare([product for product in wanted if product not in known])
    new: dict[Product, Timing] = {}
    layers: dict[str, Layer] = {}
    for these, contest in zip(alike.values(), contests, strict=True):
        one = these[0]
        new |= timed(contest, {**known, **new}, bench, effort)
        times = {
            of: profiled({**known, **new}, contest.product(of, 1), one.profile)
            for of in one.offered
        }
        for spot in these:
            layers[spot.name] = Layer(
                name=spot.name,
                linears=spot.linears,
                options=tuple(
                    Option(
                        candidate=of,
                        time=time,
                        num_bytes=round(contest.costs[of][0]),
                        error=_error(spot, of, factors),
                    )
                    for of, time in times.items()
                    if time is not None
                ),
            )
    bench.release()
    return [layers[spot.name] for spot in spots], new


def _contest(these: Sequence[Spot], factors: Mapping[Scheme, float], bench: Bench) -> Contest:
    """Of spots that are alike: a candidate costs its bytes, and an error in each of them."""
    one = these[0]
    return Contest(
        rows=one.rows,
        columns=one.columns,
        dtype=one.dtype,
        calls=one.profile.calls,
        costs={
            of: (
                bench.num_bytes(of, one.rows, one.columns, one.dtype),
                *(_error(spot, of, factors) for spot in these),
            )
            for of in one.offered
        },
    )


def _error(spot: Spot, candidate: Candidate, factors: Mapping[Scheme, float]) -> float:
    if candidate.scheme is None:
        return 0.0
    return spot.errors[candidate.scheme] * factors.get(candidate.scheme, 1.0)


def refuse_apart(joined: Iterable[tuple[str, ...]], recorder: Recorder) -> None:
    """Linears are joined by their names: were they handed one input?"""
    for names in joined:
        together = recorder[names[0]].linears
        if apart := [name for name in names if name not in together]:
            raise QuantizationError(
                f"join: '{apart[0]}' was handed another input than '{names[0]}': write join=False"
            )
