"""What a store knows a model, and errors on it, by: digests of what is cheap to know of them.

To hash a model's files would take longer than to choose.
"""

import hashlib
from pathlib import Path
from typing import Any

from orchestrator.checks import Prepared
from workers.layout import dump
from workers.plan import SAMPLE_TOKENS
from workers.sensing import SEQUENCES

_SENSED_VERSION = 1  # raised by hand whenever errors of the same would be others


def errors_key(prepared: Prepared) -> str:
    """Of all that errors are measured on."""
    return _short(
        {
            **_of_model(prepared),
            "version": _SENSED_VERSION,
            "texts": prepared.tokens_digest,
            "statistics": prepared.statistics and prepared.statistics.digest,
            "sample": [SEQUENCES, SAMPLE_TOKENS],
        }
    )


def model_key(prepared: Prepared) -> str:
    return _short(_of_model(prepared))


def _of_model(prepared: Prepared) -> dict[str, Any]:
    plan, source = prepared.plan, prepared.source
    path = Path(plan.model_path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors = source.tensors
    return {
        "tensors": [[n, str(tensors[n].dtype), list(tensors[n].shape)] for n in sorted(tensors)],
        "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "content": source.version,
        "dtypes": [plan.gguf_dtype, plan.contract.compute_dtype],
    }


def _short(told: dict[str, Any]) -> str:
    return hashlib.sha256(dump(told)).hexdigest()[:16]
