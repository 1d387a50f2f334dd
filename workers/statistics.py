"""The statistics of a LinearGroup's inputs, whole: from what workers collected, or from a store.

Kept in a store they are artifacts of their own (`calibration.keep_statistics`): one safetensors
file for each group, with the Hessian sums' lower triangle, the ranges and the sample, and a record
beside it. A later job that names them needs no texts and no forward passes.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantcore.errors import StoreError
from quantcore.moments import Moments
from quantcore.ranges import Ranges
from quantcore.tree import Span, total
from workers.layout import dump, hash_file, statistics_file, statistics_record
from workers.plan import GroupPlan
from workers.store import Store
from workers.tasks import BandMoments, InputRanges

Collected = Iterable[BandMoments | InputRanges]


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What is known of a group's inputs; one of the two may not have been asked for."""

    moments: Moments | None
    ranges: Ranges | None


def reduce_band(collected: Iterable[BandMoments], chunks: int) -> BandMoments:
    """All workers' sums for one row band, added up along the fixed tree."""
    bands = list(collected)
    moments = total(_nodes(bands), chunks)
    whole = (moments.sum_II, moments.tokens, moments.dropped)
    return BandMoments(bands[0].first_row, {(0, chunks): whole})


def whole(collected: Collected, chunks: int, device: torch.device) -> GroupStatistics:
    """One group's statistics, from bands that are reduced or are still everyone's own."""
    parts = list(collected)
    bands = [part for part in parts if isinstance(part, BandMoments)]
    ranges = [part for part in parts if isinstance(part, InputRanges)]
    return GroupStatistics(
        _whole_moments(bands, chunks, device) if bands else None,
        _whole_ranges(ranges, chunks, device) if ranges else None,
    )


def keep(
    store: Store, block: int, number: int, group: GroupPlan, statistics: GroupStatistics
) -> None:
    """Write one group's statistics and their record. Who comes second changes nothing."""
    moments, ranges = statistics.moments, statistics.ranges
    assert moments is not None and ranges is not None
    tensors = {
        "sum": _packed(moments.sum_II.cpu()),
        "low": ranges.low_I.cpu(),
        "high": ranges.high_I.cpu(),
        "sample": ranges.sample_SI.cpu().contiguous(),
    }
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        local = Path(scratch) / "statistics.safetensors"
        save_file(tensors, local)
        sha256, size = hash_file(local)
        name = statistics_file(block, number, sha256)
        store.put_file(name, local)
    record = {
        "file": name,
        "sha256": sha256,
        "size": size,
        "linears": [layer.name for layer in group.layers],
        "in_features": group.in_features,
        "tokens": moments.tokens,
        "dropped": moments.dropped,
    }
    store.put_if_absent(statistics_record(block, number), dump(record))


def load(store: Store, record: dict[str, Any], device: torch.device) -> GroupStatistics:
    """One group's statistics as they were kept. Raises StoreError if they are not."""
    packed, *ranges = _read(store, record, ("sum", "low", "high", "sample"))
    sum_II = _unpacked(packed, record["in_features"]).to(device)
    return GroupStatistics(
        Moments(sum_II, record["tokens"], record["dropped"]), _ranges(ranges, record, device)
    )


def load_ranges(store: Store, record: dict[str, Any], device: torch.device) -> Ranges:
    """The same without the Hessian's sum, which is many times as large as all else."""
    return _ranges(_read(store, record, ("low", "high", "sample")), record, device)


def _read(store: Store, record: dict[str, Any], names: Sequence[str]) -> list[Tensor]:
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        local = Path(scratch) / "statistics.safetensors"
        store.get_file(record["file"], local)
        if hash_file(local) != (record["sha256"], record["size"]):
            raise StoreError(f"{store.url}: {record['file']} is not what was kept")
        with safe_open(local, "pt") as tensors:
            return [tensors.get_tensor(name) for name in names]


def _ranges(tensors: Sequence[Tensor], record: dict[str, Any], device: torch.device) -> Ranges:
    low_I, high_I, sample_SI = (tensor.to(device) for tensor in tensors)
    tokens, dropped = record["tokens"], record["dropped"]
    return Ranges(low_I, high_I, sample_SI, rows=0, tokens=tokens, dropped=dropped)


def read_record(store: Store, block: int, number: int) -> dict[str, Any]:
    name = statistics_record(block, number)
    try:
        record: dict[str, Any] = json.loads(store.get(name))
    except ValueError:
        raise StoreError(f"{store.url}: {name} is not JSON") from None
    return record


def _whole_moments(bands: Iterable[BandMoments], chunks: int, device: torch.device) -> Moments:
    by_row: dict[int, list[BandMoments]] = {}
    for part in bands:
        by_row.setdefault(part.first_row, []).append(part)
    totals = {row: total(_nodes(parts, device), chunks) for row, parts in by_row.items()}
    if len(totals) == 1:
        return totals[0]
    width = max(band.sum_II.shape[1] for band in totals.values())
    sum_II = torch.zeros(width, width, device=device)
    for row, band in totals.items():
        rows, columns = band.sum_II.shape
        sum_II[row : row + rows, :columns] = band.sum_II
    return Moments(sum_II, totals[0].tokens, totals[0].dropped)


def _whole_ranges(parts: Iterable[InputRanges], chunks: int, device: torch.device) -> Ranges:
    nodes: dict[Span, Ranges] = {}
    for part in parts:
        for span, (low_I, high_I, sample_SI, tokens, dropped) in part.nodes.items():
            low, high, sample = (one.to(device) for one in (low_I, high_I, sample_SI))
            nodes[span] = Ranges(low, high, sample, rows=0, tokens=tokens, dropped=dropped)
    return total(nodes, chunks)


def _nodes(parts: Iterable[BandMoments], device: torch.device | None = None) -> dict[Span, Moments]:
    return {
        span: Moments(sum_RI.to(device), tokens, dropped)
        for part in parts
        for span, (sum_RI, tokens, dropped) in part.nodes.items()
    }


def _packed(sum_II: Tensor) -> Tensor:
    """The lower triangle, row after row."""
    return sum_II[torch.ones_like(sum_II, dtype=torch.bool).tril()]


def _unpacked(packed: Tensor, width: int) -> Tensor:
    sum_II = torch.zeros(width, width)
    sum_II[torch.ones(width, width, dtype=torch.bool).tril()] = packed
    return sum_II
