"""Output errors of linears under schemes, kept beside the measurement cache for later plans.

    STORE/measurements/errors/<what they were measured on>/<start of the content's SHA-256>.json
    {"version": 1, "errors": {"model.layers.0.mlp.up_proj": {"int8 sym channel": 0.0001, ...}, ...},
     "divergences": {"<digest of a whole model's variant>": 0.01, ...}}

What they were measured on is a digest of model, texts and dtype (orchestrator/to_plan.py). As with
times (measured.py) a file is never written over: who has measured writes one, who reads merges all,
and `tidy` makes one of many. What cannot be read, or is of another version, is named, ignored and
left where it is.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from quantcore.errors import StoreError
from quantcore.schemes import Scheme
from workers.layout import MEASUREMENTS, dump
from workers.store import Store, open_store

VERSION = 1
_LISTINGS = 8  # of a store that others tidy while it is read

Errors = Mapping[str, Mapping[Scheme, float]]  # by linear


def open_errors(url: str, key: str, patience_s: float = 0.0) -> Store:
    """Of an `output.store`."""
    return open_store(f"{url.rstrip('/')}/{MEASUREMENTS}/errors/{key}", patience_s=patience_s)


def keep(store: Store, errors: Errors) -> None:
    by_label = {
        name: {scheme.label(): error for scheme, error in of.items()} for name, of in errors.items()
    }
    _write(store, _Document(by_label, {}))


def keep_divergence(store: Store, variant: str, divergence: float) -> None:
    _write(store, _Document({}, {variant: divergence}))


def known(
    store: Store, schemes: Mapping[str, Scheme], warn: Callable[[str], None]
) -> dict[str, dict[Scheme, float]]:
    """All that is known of these schemes, by their labels; `warn` is told of files of no use."""
    errors = _merged(_documents(store, warn).values()).errors
    return {
        linear: {schemes[label]: error for label, error in of.items() if label in schemes}
        for linear, of in errors.items()
    }


def known_divergences(store: Store) -> dict[str, float]:
    return _merged(_documents(store, _unsaid).values()).divergences


def tidy(store: Store) -> None:
    """One file instead of many, for the next reader's sake."""
    documents = _documents(store, _unsaid)
    if len(documents) > 1:
        kept = _write(store, _merged(documents.values()))
        for name in documents.keys() - {kept}:
            store.delete(name)


@dataclass(frozen=True, slots=True)
class _Document:
    errors: dict[str, dict[str, float]]
    divergences: dict[str, float]


def _write(store: Store, document: _Document) -> str:
    data = dump({"version": VERSION, **asdict(document)})
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.json"
    store.put(name, data)
    return name


def _merged(documents: Iterable[_Document]) -> _Document:
    """Of two that differ the lesser, whichever comes first: their order is all one."""
    errors: dict[str, dict[str, float]] = {}
    divergences: dict[str, float] = {}
    for document in documents:
        tables = [(divergences, document.divergences)]
        tables += [(errors.setdefault(name, {}), of) for name, of in document.errors.items()]
        for mine, its in tables:
            mine.update({key: min(its[key], mine.get(key, math.inf)) for key in its})
    return _Document(errors, divergences)


def _unsaid(_line: str) -> None:
    """It was told of once."""


def _documents(store: Store, warn: Callable[[str], None]) -> dict[str, _Document]:
    """By name, those that can be read. One that goes away meanwhile was merged: look again."""
    found: dict[str, _Document | str] = {}
    for _ in range(_LISTINGS):
        new = [name for name in store.list() if name.endswith(".json") and name not in found]
        for name in new:
            with contextlib.suppress(_GoneError):
                found[name] = _document(store, name)
        if all(name in found for name in new):
            for name, one in found.items():
                if isinstance(one, str):
                    warn(f"{store.url}/{name} is ignored: {one}")
            return {name: one for name, one in found.items() if isinstance(one, _Document)}
    raise StoreError(f"{store.url}: files go as fast as they are read: try again")


class _GoneError(Exception):
    pass


def _document(store: Store, name: str) -> _Document | str:
    """Why it is of no use, if it is of none."""
    try:
        data = store.get(name)
    except StoreError:
        if store.exists(name):
            raise
        raise _GoneError from None
    try:
        told = json.loads(data)
        if told["version"] != VERSION:
            return f"errors of version {told['version']} where this reads {VERSION}"
        for of in (*told["errors"].values(), told["divergences"]):
            for error in of.values():
                if type(error) not in (int, float) or not 0 <= error < math.inf:
                    raise ValueError(f"{error!r} is no error")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        return f"errors: damaged ({why}): delete it to have them anew"
    return _Document(told["errors"], told["divergences"])
