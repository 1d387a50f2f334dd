"""What makes two runs the same job: all that decides its bits, by the name a user knows it under.

The identity is written to the ledger first. A later run that differs in any of it is refused,
naming the field; what is not in it (how many workers, where to evaluate) may change freely.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from orchestrator.checks import Prepared
from quantcore.errors import SpecError, StoreError
from workers.evaluate import read_text
from workers.layout import CALIBRATION, EVALUATION, JOB, dump
from workers.plan import PADDING, to_json
from workers.store import Store

Identity = dict[str, Any]


def identity(prepared: Prepared) -> Identity:
    """All but the model's content, which only the survey knows: see `with_content`."""
    spec, plan = prepared.spec, prepared.plan
    quantization = spec.quantization.model_dump(mode="json")
    if prepared.planned is None:
        scheme = spec.quantization.scheme_of()
        quantization["group_size"] = "tensor" if scheme.per_tensor else scheme.group_size
        quantization["zero_point"] = scheme.zero_point
    else:  # wherever the document is, and whatever else it says
        schemes = sorted(prepared.planned.schemes.items())
        told = [[name, scheme and scheme.label()] for name, scheme in schemes]
        quantization["plan"] = {
            "rounding": spec.quantization.usual_method,
            "schemes": _digest(told),
        }
    contract = to_json(plan.contract)
    kind = contract.pop("kind")
    threads = contract.pop("threads")
    contract.pop("compute_dtype")
    calibration = spec.calibration
    return {
        **_flat("quantization", quantization),
        "model (tensors)": _digest(_tensor_facts(prepared)),
        "model.dtype": spec.model.dtype if spec.model.path.endswith(".gguf") else None,
        "compute_dtype": spec.compute_dtype,
        "calibration.sequences": calibration.sequences if calibration else None,
        "calibration.length": calibration.length if calibration else None,
        "calibration.shards": calibration.shards if calibration else None,
        "calibration (token ids)": prepared.tokens_digest,
        "calibration.statistics": prepared.statistics.digest if prepared.statistics else None,
        "workers.threads": threads,
        "output.format": spec.output.format,
        **_flat("contract", contract),
        **_flat("workers.kind", kind),
    }


def with_content(known: Identity, hashes: Mapping[str, str]) -> Identity:
    """The identity with the model's content: the hash of every tensor's bytes."""
    return {**known, "model (content)": _digest(sorted(hashes.items()))}


def _tensor_facts(prepared: Prepared) -> list[list[Any]]:
    tensors = prepared.source.tensors
    return [[n, str(tensors[n].dtype), list(tensors[n].shape)] for n in sorted(tensors)]


def refuse_difference(store: Store, stored: Identity, current: Identity) -> None:
    """Raise SpecError for the first field in which a job differs from what the store began.

    Only fields that both have are compared: the content may not be known yet.
    """
    for field in current:  # in the order of `identity`: what the user wrote comes first
        if field in stored and stored[field] != current[field]:
            raise SpecError(
                f"{field}: this job was begun at {store.url} with {_short(stored[field])}, and now "
                f"it says {_short(current[field])}: put it back, or choose another name"
            )


def stored_job(store: Store) -> dict[str, Any] | None:
    """The ledger's first record: the spec and the identity that the job was begun with."""
    if not store.exists(JOB):
        return None
    try:
        job: dict[str, Any] = json.loads(store.get(JOB))
        if not isinstance(job["identity"], dict) or not isinstance(job["blocks"], int):
            raise TypeError
        if not isinstance(job["spec"]["name"], str) or "scheme" not in job["spec"]["quantization"]:
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{store.url}/{JOB} is not a job record") from None
    return job


def begin(store: Store, prepared: Prepared, current: Identity) -> dict[str, Any]:
    """Write the ledger's first record, or hold the job against the one that is there; which it is.

    The texts go first, as far as they are used: with them the store alone is enough to go on.
    """
    record = {
        "spec": prepared.spec.model_dump(mode="json"),
        "identity": current,
        "blocks": len(prepared.plan.blocks),
        "calibration": _calibrated_with(prepared),
    }
    if not store.exists(JOB):
        _keep_texts(store, prepared)
    if not store.put_if_absent(JOB, dump(record)):
        known = stored_job(store)
        assert known is not None
        refuse_difference(store, known["identity"], current)
        return known
    return record


def _calibrated_with(prepared: Prepared) -> dict[str, Any] | None:
    """For the report of whoever ends the job: only who begins it has seen the tasks."""
    tokens = prepared.plan.tokens
    if tokens is None:
        return None
    sequences, length = tokens.shape
    return {
        "sequences": sequences,
        "length": length,
        "tokens": int((tokens != PADDING).sum()),
        "tasks": prepared.sources,
    }


def _keep_texts(store: Store, prepared: Prepared) -> None:
    tokens, evaluation = prepared.plan.tokens, prepared.spec.evaluation
    if tokens is not None:
        rows = (json.dumps({"ids": row[row != PADDING].tolist()}) for row in tokens)
        store.put(CALIBRATION, "\n".join(rows).encode())
    text = read_text(evaluation) if evaluation else None
    if text is not None:
        store.put(EVALUATION, text.encode())
    if prepared.planned is not None:
        store.put(prepared.planned.name, prepared.planned.document)


def _flat(prefix: str, value: Any) -> Identity:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: Identity = {}
    for key, inner in value.items():
        flat |= _flat(f"{prefix}.{key}", inner)
    return flat


def _digest(value: Any) -> str:
    return hashlib.sha256(dump(value)).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
