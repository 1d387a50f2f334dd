"""Statistics as artifacts: the index that a job writes of what it kept, and a later job's reading.

STORE/NAME/statistics/index.json     written once all of them are there
                      BLOCK.GROUP.HASH.safetensors
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from quantcore.errors import SourceError, SpecError, StoreError
from workers.architecture import Architecture
from workers.layout import STATISTICS_INDEX, dump
from workers.plan import Plan
from workers.statistics import read_record
from workers.store import Store, safe_name

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a job kept, as far as a later one must know it before it starts."""

    digest: str  # of the index
    records: tuple[dict[str, Any], ...]  # of every LinearGroup, block after block
    model: str  # the digest of the model's content
    origin: dict[str, Any]  # the job they were made by, for the report


def write_index(store: Store, plan: Plan, model: str, origin: dict[str, Any]) -> None:
    records = [
        [read_record(store, block, group) for group in range(len(planned.groups))]
        for block, planned in enumerate(plan.blocks)
    ]
    index = {"version": _VERSION, "model": model, "origin": origin, "blocks": records}
    store.put(STATISTICS_INDEX, dump(index))


def read_index(store: Store, architecture: Architecture) -> Statistics:
    """Raises StoreError for what is no index, SpecError for one of another architecture."""
    if not store.exists(STATISTICS_INDEX):
        raise StoreError(
            f"{store.url} has no {STATISTICS_INDEX}: name STORE/NAME of a finished job that was "
            "run with calibration.keep_statistics: true"
        )
    data = store.get(STATISTICS_INDEX)
    try:
        index = json.loads(data)
        if index["version"] != _VERSION:
            raise SourceError(f"{store.url}/{STATISTICS_INDEX} was written by another version")
        records = [record for block in index["blocks"] for record in block]
        found = [[record["linears"] for record in block] for block in index["blocks"]]
        widths = [int(record["in_features"]) for record in records]
        for record in records:
            safe_name(record["file"])
        statistics = Statistics(
            hashlib.sha256(data).hexdigest(), tuple(records), str(index["model"]), index["origin"]
        )
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{store.url}/{STATISTICS_INDEX} is not an index of statistics") from None
    wanted = [
        [[linear.name for linear in group] for group in block.groups]
        for block in architecture.blocks
    ]
    here = [group[0].in_features for block in architecture.blocks for group in block.groups]
    if found != wanted or widths != here:
        raise SpecError(
            f"calibration.statistics: those at {store.url} are of a model with other linears: "
            "name a job over this model, or write text"
        )
    return statistics


def refuse_other_model(statistics: Statistics, content: dict[str, Any]) -> None:
    """`content` is the job's identity with the model's content, which the survey has read."""
    if content["model (content)"] != statistics.model:
        raise SpecError(
            "calibration.statistics: they were made with a model of the same shapes and other "
            "weights: name a job over this model, or write text"
        )
