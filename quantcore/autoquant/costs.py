"""What each linear of a model may become, with bytes, error and time: layers to choose from.

A scheme's errors are scaled once the whole model was checked under it (spots.py). A candidate that
has lost its race is no option: another is faster for certain, and costs no more in bytes or error.
Its uniform plan is dense where it lost, or none if it lost all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from quantcore.autoquant.candidates import Candidate
from quantcore.autoquant.divergence import HeldOut, undone
from quantcore.autoquant.document import Check
from quantcore.autoquant.findings import Known
from quantcore.autoquant.keys import Keys
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.options import Layer, Option, Profile, profiled
from quantcore.autoquant.race import Effort
from quantcore.autoquant.sensitivity import output_errors
from quantcore.autoquant.spots import Spot, contests, legal, scales, schemes_in, spot, takers
from quantcore.autoquant.timing import Bench, Contest, timed
from quantcore.errors import QuantizationError
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme


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
    weights = {name: linear.weight for name, linear in linears.items()}
    one = next(iter(weights.values()))
    dtype, device = str(one.dtype).removeprefix("torch."), one.device.type
    shapes = {name: (len(weight), weight.shape[1]) for name, weight in weights.items()}
    offered = legal(list(shapes.values()), schemes, dtype, device)
    asked = schemes_in(offered)
    errors: dict[str, dict[Scheme, float]] = {}
    for name, weight in weights.items():
        findings = {scheme: keys.error(name, scheme) for scheme in asked}
        missing = [scheme for scheme in asked if findings[scheme] not in known]
        if missing:
            found = output_errors(name, weight, recorder[name], missing)
            known.add({findings[scheme]: error for scheme, error in found.items()})
        errors[name] = {scheme: known[findings[scheme]] for scheme in asked}
    recorded = recorder[next(iter(weights))].calls
    profile = profile or Profile(name="recorded", calls=dict(recorded))
    return spot(shapes, offered, errors, dtype, profile)


def checked(
    model: nn.Module,
    spots: Sequence[Spot],
    recorder: Recorder,
    held_out: Callable[[], HeldOut],
    known: Known,
    keys: Keys,
) -> tuple[dict[Scheme, float], list[Check]]:
    """For each scheme, what its errors are scaled by, from the whole model under it alone."""
    moved = {}
    for scheme, taking in takers(spots).items():
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
        moved[scheme] = known[finding]
    return scales(spots, moved)


def measured(
    spots: Sequence[Spot],
    factors: Mapping[Scheme, float],
    known: Mapping[Product, Timing],
    bench: Bench,
    effort: Effort,
) -> tuple[list[Layer], dict[Product, Timing]]:
    """Layers to choose from, and what was timed for them: spots of one shape race once."""
    alike = contests(spots)
    racing = [_contest(these, factors, bench) for these in alike]
    wanted = [of for contest in racing for of in contest.products()]
    bench.prepare([product for product in wanted if product not in known])
    new: dict[Product, Timing] = {}
    layers: dict[str, Layer] = {}
    for these, contest in zip(alike, racing, strict=True):
        one = these[0]
        new |= timed(contest, {**known, **new}, bench, effort)
        times = {
            of: profiled({**known, **new}, contest.product(of, 1), one.profile)
            for of in one.offered
        }
        for each in these:
            layers[each.name] = Layer(
                name=each.name,
                linears=each.linears,
                options=tuple(
                    Option(
                        candidate=of,
                        time=time,
                        num_bytes=round(contest.costs[of][0]),
                        error=_error(each, of, factors),
                    )
                    for of, time in times.items()
                    if time is not None
                ),
            )
    bench.release()
    return [layers[of.name] for of in spots], new


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
                *(_error(each, of, factors) for each in these),
            )
            for of in one.offered
        },
    )


def _error(of: Spot, candidate: Candidate, factors: Mapping[Scheme, float]) -> float:
    if candidate.scheme is None:
        return 0.0
    return of.errors[candidate.scheme] * factors.get(candidate.scheme, 1.0)


def refuse_apart(joined: Iterable[tuple[str, ...]], recorder: Recorder) -> None:
    """Linears are joined by their names: were they handed one input?"""
    for names in joined:
        together = recorder[names[0]].linears
        if apart := [name for name in names if name not in together]:
            raise QuantizationError(
                f"join: '{apart[0]}' was handed another input than '{names[0]}': write join=False"
            )
