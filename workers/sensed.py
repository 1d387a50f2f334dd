"""Output errors of linears under schemes, kept beside the measurement cache for later plans.

    STORE/measurements/errors/<what they were measured on>/<start of the content's SHA-256>.json
    {"version": 1, "errors": {"model.layers.0.mlp.up_proj": {"int8 sym channel": 0.0001, ...}, ...},
     "divergences": {"<digest of a whole model's variant>": 0.01, ...}}

What they were measured on is a digest of model, texts and dtype (orchestrator/to_plan.py). As with
times (measured.py) a file is never written over: who has measured writes one, who reads merges all.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from quantcore.errors import StoreError
from quantcore.schemes import Scheme
from workers.layout import MEASUREMENTS, dump
from workers.store import Store, open_store

VERSION = 1

Errors = Mapping[str, Mapping[Scheme, float]]  # by linear


def open_errors(url: str, key: str, patience_s: float = 0.0) -> Store:
    """Of an `output.store`."""
    return open_store(f"{url.rstrip('/')}/{MEASUREMENTS}/errors/{key}", patience_s=patience_s)


def keep(store: Store, errors: Errors) -> None:
    by_label = {
        name: {scheme.label(): error for scheme, error in of.items()} for name, of in errors.items()
    }
    _write(store, by_label, {})


def keep_divergence(store: Store, variant: str, divergence: float) -> None:
    _write(store, {}, {variant: divergence})


def known(store: Store, schemes: Mapping[str, Scheme]) -> dict[str, dict[Scheme, float]]:
    """All that is known of these schemes, by their labels. Of two that differ, the first file's."""
    found: dict[str, dict[Scheme, float]] = {}
    for document in _documents(store):
        for linear, of in document["errors"].items():
            mine = found.setdefault(linear, {})
            for label, error in of.items():
                if label in schemes:
                    mine.setdefault(schemes[label], error)
    return found


def known_divergences(store: Store) -> dict[str, float]:
    found: dict[str, float] = {}
    for document in _documents(store):
        found = document["divergences"] | found
    return found


def _write(
    store: Store, errors: Mapping[str, Mapping[str, float]], divergences: Mapping[str, float]
) -> None:
    data = dump({"version": VERSION, "errors": errors, "divergences": divergences})
    store.put(f"{hashlib.sha256(data).hexdigest()[:16]}.json", data)


def _documents(store: Store) -> Iterator[dict[str, Any]]:
    """Those of this version, in the order of their names. Raises StoreError for a damaged one."""
    for name in sorted(name for name in store.list() if name.endswith(".json")):
        try:
            document: dict[str, Any] = json.loads(store.get(name))
            if document["version"] != VERSION:
                continue
            for of in (*document["errors"].values(), document["divergences"]):
                for error in of.values():
                    if type(error) not in (int, float) or not 0 <= error < math.inf:
                        raise ValueError(f"{error!r} is no error")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{store.url}/{name}: damaged ({error}): delete it to have it measured anew"
            ) from None
        yield document
