"""report/report.json: what was made, layer by layer, and how good it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.checks import Prepared, describe

VERSION = 1


def make_report(
    prepared: Prepared,
    records: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    phases: Mapping[str, float],
    tasks: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    layers = [line for record in records for line in record["layers"]]
    return {
        "version": VERSION,
        "plan": describe(prepared),
        "statistics": prepared.statistics.origin if prepared.statistics else None,
        "layers": layers,
        "fallbacks": [line["layer"] for line in layers if line["fallback"]],
        "raised_damping": [
            line["layer"]
            for line in layers
            if line["damping"] and line["damping"] > prepared.plan.gptq.damping
        ],
        "bytes": {
            "source": sum(info.num_bytes for info in prepared.source.tensors.values()),
            "quantized": sum(record["size"] for record in records),
        },
        "evaluation": metrics,
        "seconds": dict(phases),
        "task_seconds": {
            kind: {"count": count, "mean": seconds / count, "total": seconds}
            for kind, (count, seconds) in tasks.items()
        },
    }
