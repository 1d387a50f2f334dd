"""The measurement cache in a store, which gathers what many wrote (gathered.py).

    STORE/measurements/<start of the content's SHA-256>.json

Merging takes the better known of two timings (quantcore/autoquant/measurements.py), whichever comes
first. `tidy` leaves alone what it cannot read to the end.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from quantcore.autoquant.measurements import (
    HardwareKind,
    Measurements,
    Product,
    Timing,
    merged,
    parse,
    written,
)
from quantcore.errors import StoreError
from workers import gathered
from workers.layout import MEASUREMENTS
from workers.store import Store, open_store


def open_measurements(url: str, patience_s: float = 0.0) -> Store:
    """The cache that all jobs of one `output.store` share."""
    return open_store(f"{url.rstrip('/')}/{MEASUREMENTS}", patience_s=patience_s)


def keep(store: Store, measurements: Measurements) -> str:
    """Write down what was measured; the file's name. Twice the same is once."""
    return gathered.keep(store, _data([measurements]))


def read(store: Store) -> Measurements:
    """All that is known; files that cannot be used are named in `ignored`."""
    return merged(gathered.gather(store, _read).values())


def known(store: Store, kind: HardwareKind, warn: Callable[[str], None]) -> dict[Product, Timing]:
    """What need not be timed on this kind; `warn` is told of all that is there and is no use."""
    timings, lines = read(store).of_kind(kind)
    for line in lines:
        warn(line)
    return timings


def tidy(store: Store) -> None:
    """One file instead of many, for the next reader's sake."""
    files = gathered.gather(store, _read)
    gathered.tidy(store, {name: one for name, one in files.items() if not one.ignored}, _data)


def _data(many: Iterable[Measurements]) -> bytes:
    return written(merged(many)).encode()


def _read(place: str, data: bytes) -> Measurements:
    try:
        one = parse(data.decode())
    except (StoreError, UnicodeDecodeError) as error:
        return Measurements(of={}, ignored=(f"{place} is ignored: {error}",))
    return replace(one, ignored=tuple(f"{place}: {line}" for line in one.ignored))
