"""JSON files in a store that many write, and that whoever reads merges: measurements, errors.

    <start of the content's SHA-256>.json

A file is never written over, so writers need not know of each other: no lock, no compare-and-swap
that loses to the next one, and none of a store's conditional writes. Merging must come to the same
in any order, and of twice the same; any reader of the same files then knows the same. `tidy` makes
few files of many, and deletes none before what stood in it stands in another.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from quantcore.errors import StoreError
from workers.store import Store

T = TypeVar("T")

_LISTINGS = 16  # of a store that others tidy while it is read


def keep(store: Store, data: bytes) -> str:
    """The file's name. Twice the same is once."""
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.json"
    store.put(name, data)
    return name


def gather(store: Store, read: Callable[[str, bytes], T]) -> dict[str, T]:
    """By name, what `read` makes of a file: of its whole name, for errors, and its content.

    One that goes away meanwhile was merged into another: look again. A listing is no one moment's
    either, and may have neither: so the last one is one that showed nothing new.
    """
    found: dict[str, T] = {}
    whole = False
    for listing in range(_LISTINGS):
        names = [name for name in store.list() if name.endswith(".json") and "/" not in name]
        new = [name for name in names if name not in found]
        if listing and whole and not new:
            return found
        for name in new:
            data = _get(store, name)
            if data is not None:
                found[name] = read(f"{store.url}/{name}", data)
        whole = all(name in found for name in new)
    if whole:
        return found
    raise StoreError(f"{store.url}: files go as fast as they are read: try again")


def tidy(store: Store, whole: Mapping[str, T], merged: Callable[[Iterable[T]], bytes]) -> None:
    """One file instead of these, for the next reader's sake."""
    if len(whole) > 1:
        kept = keep(store, merged(whole.values()))
        for name in whole.keys() - {kept}:
            store.delete(name)


def _get(store: Store, name: str) -> bytes | None:
    try:
        return store.get(name)
    except StoreError:
        if store.exists(name):
            raise
        return None
