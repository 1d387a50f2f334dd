"""report/report.json: what was made, layer by layer, and how good it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.checks import Prepared
from orchestrator.described import describe
from orchestrator.loop import Timings

VERSION = 2


def make_report(
    prepared: Prepared,
    texts: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    timings: Timings,
    profile: Mapping[str, Any],
    probed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    layers = [line for record in records for line in record["layers"]]
    return {
        "version": VERSION,
        "plan": describe(prepared),
        "calibration": texts,
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
        "needs": _needs(prepared, timings),
        "probe": probed,
        "evaluation": metrics,
        "profile": profile,
        "seconds": dict(timings.phases),
        "task_seconds": {
            kind: {"count": count, "mean": seconds / count, "total": seconds}
            for kind, (count, seconds) in timings.tasks.items()
        },
    }


def _needs(prepared: Prepared, timings: Timings) -> dict[str, Any]:
    """What was predicted, and what it was. Workers of one process share its host memory."""
    prediction = prepared.prediction
    measured = {
        place: max((peak.get(place, 0) for peak in timings.peaks.values()), default=0)
        for place in ("host", "device")
    }
    return {
        "host_bytes": {"predicted": prediction.host_bytes, "measured": measured["host"]},
        "device_bytes": {"predicted": prediction.device_bytes, "measured": measured["device"]},
        "seconds": {
            phase: {"predicted": round(seconds, 1), "measured": timings.phases.get(phase)}
            for phase, seconds in prediction.seconds.items()
        },
        "workers": {str(worker): peak for worker, peak in sorted(timings.peaks.items())},
    }
