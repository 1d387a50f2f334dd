"""Calibration texts as windows of token ids."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.spec import CalibrationSpec
from quantcore.errors import SourceError, SpecError


def token_windows(spec: CalibrationSpec, tokenizer: Any) -> Tensor:
    """Token ids, int64 (sequences, length).

    A text's windows are evenly spaced over its first `max_characters` characters and do not
    overlap; the seed shifts them together within the stride. Rows of ids in a jsonl are taken as
    they are, in order. No special tokens are added. Raises SourceError for a file that does not
    read and SpecError for too little of it.
    """
    if spec.jsonl is None:
        assert spec.text is not None
        return _cut(_encode(tokenizer, _read(spec.text)[: spec.max_characters]), spec, "text")
    rows = _rows(spec.jsonl, spec.field)
    if rows and isinstance(rows[0], list):
        return _given_ids(rows, spec, len(tokenizer))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise SpecError(
                f"calibration.field: '{spec.field}' of row {number} of {spec.jsonl} is not a text: "
                "name a field that holds texts, or token ids in every row"
            )
    text = "\n\n".join(rows)
    return _cut(_encode(tokenizer, text[: spec.max_characters]), spec, "jsonl")


def digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _cut(ids: list[int], spec: CalibrationSpec, source: str) -> Tensor:
    stride = len(ids) // spec.sequences
    if stride < spec.length:
        fits = len(ids) // spec.length
        instead = f"write sequences: {fits}, or a shorter length" if fits else "give a longer text"
        raise SpecError(
            f"calibration.{source}: {spec.sequences} sequences of {spec.length} tokens need "
            f"{spec.sequences * spec.length} tokens, and the text has {len(ids)}: {instead}"
        )
    offset = random.Random(spec.seed).randrange(stride - spec.length + 1)  # noqa: S311
    starts = [offset + index * stride for index in range(spec.sequences)]
    return torch.tensor([ids[start : start + spec.length] for start in starts])


def _given_ids(rows: list[Any], spec: CalibrationSpec, vocabulary: int) -> Tensor:
    if len(rows) < spec.sequences:
        raise SpecError(
            f"calibration.sequences: {spec.jsonl} has {len(rows)} rows: write {len(rows)} or fewer"
        )
    for number, row in enumerate(rows[: spec.sequences], start=1):
        if not isinstance(row, list) or len(row) < spec.length:
            raise SpecError(
                f"calibration.length: row {number} of {spec.jsonl} has fewer than "
                f"{spec.length} token ids"
            )
        if not all(type(token) is int and 0 <= token < vocabulary for token in row):
            raise SpecError(f"calibration.jsonl: row {number} has ids outside the vocabulary")
    return torch.tensor([row[: spec.length] for row in rows[: spec.sequences]])


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"cannot read {path}: {reason}") from None


def _rows(path: Path, field: str) -> list[Any]:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line)[field])
        except ValueError:
            raise SourceError(f"line {number} of {path} is not JSON") from None
        except (KeyError, TypeError):
            raise SpecError(
                f"calibration.field: line {number} of {path} has no '{field}': name its text field"
            ) from None
    return rows
