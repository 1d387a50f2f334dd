"""Output errors of linears under schemes, kept beside the measurement cache for later plans.

    STORE/measurements/errors/<what they were measured on>/<start of the content's SHA-256>.json
    {"version": 1, "errors": {"model.layers.0.mlp.up_proj": {"int8 sym channel": 0.0001, ...}, ...},
     "divergences": {"<digest of a whole model's variant>": 0.01, ...}}

What they were measured on is a digest of model, texts and dtype (orchestrator/to_plan.py), by what
is cheap to know of a model that lies in one piece nowhere. A model in one process
(quantcore/autoquant/findings.py) has its errors by the contents of weights and samples instead.
Many write, who reads merges (gathered.py): of two errors the lesser. What cannot be read, or is of
another version, is named, ignored and left where it is.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from quantcore.errors import DAMAGE, why_damaged
from quantcore.schemes import Scheme
from workers import gathered
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
    gathered.keep(store, _data([_Document(by_label, {})]))


def keep_divergence(store: Store, variant: str, divergence: float) -> None:
    gathered.keep(store, _data([_Document({}, {variant: divergence})]))


def known(
    store: Store, schemes: Mapping[str, Scheme], warn: Callable[[str], None]
) -> dict[str, dict[Scheme, float]]:
    """All that is known of these schemes, by their labels; `warn` is told of files of no use."""
    found = gathered.gather(store, _read)
    for name, document in found.items():
        if isinstance(document, str):
            warn(f"{store.url}/{name} is ignored: {document}")
    errors = _merged(_useful(found).values()).errors
    return {
        linear: {schemes[label]: error for label, error in of.items() if label in schemes}
        for linear, of in errors.items()
    }


def known_divergences(store: Store) -> dict[str, float]:
    return _merged(_useful(gathered.gather(store, _read)).values()).divergences


def tidy(store: Store) -> None:
    """One file instead of many, for the next reader's sake."""
    gathered.tidy(store, _useful(gathered.gather(store, _read)), _data)


@dataclass(frozen=True, slots=True)
class _Document:
    errors: dict[str, dict[str, float]]
    divergences: dict[str, float]


def _data(many: Iterable[_Document]) -> bytes:
    return dump({"version": VERSION, **asdict(_merged(many))})


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


def _useful(found: Mapping[str, _Document | str]) -> dict[str, _Document]:
    return {name: one for name, one in found.items() if isinstance(one, _Document)}


def _read(_place: str, data: bytes) -> _Document | str:
    """Why it is of no use, if it is of none."""
    try:
        told = json.loads(data)
        if told["version"] != VERSION:
            return f"errors of version {told['version']} where this reads {VERSION}"
        for of in (*told["errors"].values(), told["divergences"]):
            for error in of.values():
                if type(error) not in (int, float) or not 0 <= error < math.inf:
                    raise ValueError(f"{error!r} is no error")
    except DAMAGE as error:
        return f"errors: damaged ({why_damaged(error)}): delete it to have them anew"
    return _Document(told["errors"], told["divergences"])
