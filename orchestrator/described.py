"""What a job that may start comes to, as plain values: for people, for --json, for the report."""

from typing import Any

from orchestrator.checks import Prepared
from orchestrator.phases import peak


def describe(prepared: Prepared) -> dict[str, Any]:
    """What the plan comes to, for people and for --json."""
    schemes: dict[str, int] = {}
    for layer in prepared.plan.layers():
        label = f"{layer.scheme.label()} {layer.method}" if layer.scheme else "kept as it is"
        schemes[label] = schemes.get(label, 0) + 1
    contract = prepared.plan.contract
    return {
        "job": prepared.spec.name,
        "model": prepared.architecture.model_type,
        "blocks": len(prepared.plan.blocks),
        "layers": schemes,
        "devices": [
            {**chosen.kind, "workers": admitted.prediction.workers}
            for chosen, admitted in prepared.team.parts
        ],
        "workers": prepared.workers,
        "threads": contract.threads,
        "compute_dtype": contract.compute_dtype,
        "micro_batch": contract.micro_batch,
        "chunks": contract.chunks,
        "store": prepared.plan.store,
        "predicted": predicted(prepared),
    }


def predicted(prepared: Prepared) -> dict[str, Any]:
    """What admission told, as plain values; bytes are at most, seconds are an estimate."""
    prediction = prepared.prediction
    host, _ = peak(prediction.host)
    device = peak(prediction.device)[0] if prediction.device else None
    return {
        "worker": {
            "host": {"bytes": prediction.host_bytes, "phase": host, "phases": prediction.host},
            "device": {
                "bytes": prediction.device_bytes,
                "phase": device,
                "phases": prediction.device,
            },
            "scratch_bytes": prediction.scratch,
        },
        "job": {
            "object_store_bytes": prediction.object_store,
            "store_bytes": prediction.store,
            "network_bytes": prediction.network,
            "seconds": {phase: round(s, 1) for phase, s in prediction.seconds.items()},
        },
        "rates": prediction.rates.said,
        "hidden_states_on": prediction.states_on,
        "notes": [*prepared.notes, *prepared.admitted.notes],
    }
