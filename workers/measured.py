"""The measurement cache in a store: who has measured writes a file, who reads merges them all.

    STORE/measurements/<start of the content's SHA-256>.json

A file is never written over, so writers need not know of each other: no lock, no compare-and-swap
that loses to the next one, and none of a store's conditional writes. Merging takes the better known
of two timings (quantcore/autoquant/measurements.py), whichever comes first and however often: any
reader of the same files knows the same. `tidy` makes few files of many. It deletes none before what
stood in it stands in another, and leaves alone what it cannot read to the end.
"""

import hashlib
from collections.abc import Callable
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
from workers.layout import MEASUREMENTS
from workers.store import Store, open_store

_LISTINGS = 8  # of a store that others tidy while it is read


def open_measurements(url: str, patience_s: float = 0.0) -> Store:
    """The cache that all jobs of one `output.store` share."""
    return open_store(f"{url.rstrip('/')}/{MEASUREMENTS}", patience_s=patience_s)


def keep(store: Store, measurements: Measurements) -> str:
    """Write down what was measured; the file's name. Twice the same is once."""
    data = written(measurements).encode()
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.json"
    store.put(name, data)
    return name


def read(store: Store) -> Measurements:
    """All that is known; files that cannot be used are named in `ignored`."""
    return merged(_files(store).values())


def known(store: Store, kind: HardwareKind, warn: Callable[[str], None]) -> dict[Product, Timing]:
    """What need not be timed on this kind; `warn` is told of all that is there and is no use."""
    timings, lines = read(store).of_kind(kind)
    for line in lines:
        warn(line)
    return timings


def tidy(store: Store) -> None:
    """One file instead of many, for the next reader's sake."""
    whole = {name: one for name, one in _files(store).items() if not one.ignored}
    if len(whole) < 2:
        return
    kept = keep(store, merged(whole.values()))
    for name in whole.keys() - {kept}:
        store.delete(name)


def _files(store: Store) -> dict[str, Measurements]:
    """By name. One that goes away while this reads was merged into another: look again."""
    found: dict[str, Measurements] = {}
    for _ in range(_LISTINGS):
        names = [name for name in store.list() if name.endswith(".json") and "/" not in name]
        new = {name: _get(store, name) for name in names if name not in found}
        found |= {name: one for name, one in new.items() if one is not None}
        if all(one is not None for one in new.values()):
            return found
    raise StoreError(f"{store.url}: files go as fast as they are read: try again")


def _get(store: Store, name: str) -> Measurements | None:
    try:
        data = store.get(name)
    except StoreError:
        if store.exists(name):
            raise
        return None
    try:
        one = parse(data.decode())
    except (StoreError, UnicodeDecodeError) as error:
        return Measurements(of={}, ignored=(f"{store.url}/{name} is ignored: {error}",))
    return replace(one, ignored=tuple(f"{store.url}/{name}: {line}" for line in one.ignored))
