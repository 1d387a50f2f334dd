"""What another device is to be asked for: candidates' bytes and contests, with no device here.

A fleet's driver has spots (spots.py) and no GPU. What a weight takes in memory it reads off tensors
that have shapes alone; what it has no time of is said by a bench that can't time:

    spots of one shape -> is all of it known? -> else a worker's `costs.measured`, and asked again

A race that was begun with some times known may find others to be wanting, so it is asked until no
more is. Layers to choose from are then made of what is known.
"""

from collections.abc import Mapping, Sequence

from quantcore.autoquant.costs import measured
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.options import Layer
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.spots import Spot
from quantcore.autoquant.timing import Bench
from quantcore.schemes import Scheme


class NotTimedError(Exception):
    """A time is wanted that nobody has."""


class Asked(Bench):
    """A bench without a device."""

    def __init__(self) -> None:
        super().__init__("meta")

    def stopwatch(self, product: Product) -> Stopwatch:
        raise NotTimedError


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
