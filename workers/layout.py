"""Where things stand in a job's folder, and what its records hold."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JOB = "ledger/job.json"
EACH_KIND = "ledger/each-kind.json"  # of a job whose artifacts are jobs of their own
CALIBRATION = "ledger/calibration.jsonl"  # the token ids, a row for each sequence
EVALUATION = "ledger/evaluation.txt"  # the part of the text that is measured
KEPT = "activations"
OUTSIDE = "outside"
STATISTICS = "statistics"
STATISTICS_INDEX = f"{STATISTICS}/index.json"
MANIFEST = "manifest.json"
REPORT = "report/report.json"
PICTURE = "report/profile.svg"  # of the report's profile
PLANS = "plan"
MEASUREMENTS = "measurements"  # of a store, beside its jobs
MODEL = "model"
INDEX = f"{MODEL}/model.safetensors.index.json"

_READ_BYTES = 1 << 20


def kept_name(block: int, chunk: int) -> str:
    """A chunk's hidden states as the input of a block, kept while the job runs."""
    return f"{KEPT}/{block:05d}.{chunk:05d}.safetensors"


def kept_in(names: Iterable[str]) -> set[tuple[int, int]]:
    """(block, chunk) of the kept hidden states among some names of a store."""
    found = (re.fullmatch(rf"{KEPT}/(\d+)\.(\d+)\.safetensors", name) for name in names)
    return {(int(match[1]), int(match[2])) for match in found if match}


def epoch_name(epoch: int) -> str:
    """The record of the driver that is the so-manieth to drive a job."""
    return f"ledger/epoch-{epoch:06d}.json"


def beat_name(epoch: int) -> str:
    """What a driver writes over and over while it lives."""
    return f"ledger/beat-{epoch:06d}.json"


def block_key(index: int) -> str:
    return f"block-{index:05d}"


def record_name(key: str) -> str:
    return f"ledger/{key}.json"


def block_file(key: str, sha256: str) -> str:
    """Block files carry their content's hash: who writes the same bytes writes the same file."""
    return f"{MODEL}/{key}.{sha256[:16]}.safetensors"


def statistics_file(block: int, group: int, sha256: str) -> str:
    return f"{STATISTICS}/{block:05d}.{group}.{sha256[:16]}.safetensors"


def statistics_record(block: int, group: int) -> str:
    return f"ledger/{STATISTICS}-{block:05d}.{group}.json"


def dump(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size
