"""Calibration texts as sequences of token ids."""

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.spec import CalibrationSpec
from quantcore.errors import SourceError, SpecError
from workers.plan import PADDING


def token_windows(spec: CalibrationSpec, tokenizer: Any) -> Tensor:
    """Token ids of a text or a jsonl file, int64 (sequences, length), PADDING after a short one.

    A text's windows are evenly spaced over its first `max_characters` characters and do not
    overlap; the seed shifts them together within the stride. Rows of text in a jsonl are one text,
    or, with `short: pad` or `drop`, documents in an order that the seed decides. Rows of ids are
    taken as they are, in order. No special tokens are added. Raises SourceError for a file that
    does not read and SpecError for too little of it.
    """
    if spec.jsonl is None:
        assert spec.text is not None
        return _cut(encode(tokenizer, _read(spec.text)[: spec.max_characters]), spec, "text")
    rows = _rows(spec.jsonl, spec.field)
    if rows and isinstance(rows[0], list):
        return _given_ids(rows, spec, len(tokenizer))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise SpecError(
                f"calibration.field: '{spec.field}' of row {number} of {spec.jsonl} is not a text: "
                "name a field that holds texts, or token ids in every row"
            )
    if spec.short in ("pad", "drop"):
        shuffled = random.Random(spec.seed).sample(rows, len(rows))  # noqa: S311
        return _documents((encode(tokenizer, row) for row in shuffled), spec)
    text = "\n\n".join(rows)
    return _cut(encode(tokenizer, text[: spec.max_characters]), spec, "jsonl")


def fill(
    documents: Iterable[list[int]], spec: CalibrationSpec, separator: list[int]
) -> tuple[list[list[int]], list[int]]:
    """Up to `sequences` rows of `length` token ids, and for each the document that it begins in.

    Longer documents are cut off; shorter ones are padded, dropped, or joined with the next by the
    ids of `separator`, as `short` says. Those without an id are passed over. No more documents are
    asked for than it takes.
    """
    rows: list[list[int]] = []
    begins: list[int] = []
    rest: list[int] = []  # of what is joined, its beginning in document `begun`
    begun = 0
    for number, ids in enumerate(documents):
        if spec.short == "join":
            begun = begun if rest else number
            rest += [*separator, *ids] if rest and ids else ids
            while len(rest) >= spec.length and len(rows) < spec.sequences:
                rows.append(rest[: spec.length])
                begins.append(begun)
                rest, begun = rest[spec.length :], number
        elif len(ids) >= (spec.length if spec.short == "drop" else 1):
            rows.append(ids[: spec.length] + [PADDING] * (spec.length - len(ids)))
            begins.append(number)
        if len(rows) == spec.sequences:
            break
    return rows, begins


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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


def _documents(documents: Iterable[list[int]], spec: CalibrationSpec) -> Tensor:
    rows, _ = fill(documents, spec, [])
    if len(rows) < spec.sequences:
        long = f" of {spec.length} tokens or more" if spec.short == "drop" else ""
        instead = f"write sequences: {len(rows)}" if rows else "give more of them"
        raise SpecError(
            f"calibration.sequences: {spec.sequences} are wanted, and the rows of {spec.jsonl} "
            f"make {len(rows)}{long}: {instead}"
        )
    return torch.tensor(rows)


def _given_ids(rows: list[Any], spec: CalibrationSpec, vocabulary: int) -> Tensor:
    if len(rows) < spec.sequences and spec.short is None:
        raise SpecError(
            f"calibration.sequences: {spec.jsonl} has {len(rows)} rows: write {len(rows)} or fewer"
        )
    used = rows if spec.short else rows[: spec.sequences]
    for number, row in enumerate(used, start=1):
        if not isinstance(row, list) or (not spec.short and len(row) < spec.length):
            raise SpecError(
                f"calibration.length: row {number} of {spec.jsonl} has fewer than "
                f"{spec.length} token ids{': write short: pad' if isinstance(row, list) else ''}"
            )
        # by types and extremes: to look at a million ids one by one takes a quarter of a second
        if {*map(type, row)} - {int} or (row and not 0 <= min(row) <= max(row) < vocabulary):
            raise SpecError(f"calibration.jsonl: row {number} has ids outside the vocabulary")
    return _documents(used, spec)


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
