"""The header of a safetensors file, from its bytes alone.

A file is the header's length (8 bytes, little-endian), the header (JSON: by name a dtype, a shape
and the offsets of a tensor's first byte and of the one after its last, counted from the header's
end) and the tensors' bytes (https://github.com/huggingface/safetensors, section "Format"). They
must lie without gaps or overlaps, each as long as its shape says, up to the file's last byte.
What safetensors itself refuses is refused here; so are names that stand twice, of which it takes
the last.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantcore.errors import SourceError
from workers.sources.base import TensorInfo

LENGTH_BYTES = 8
_MOST_BYTES = 100_000_000  # of a header: safetensors' own bound
_MOST_COUNTED = 2**64  # it counts in 64 bits

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    info: TensorInfo
    first: int  # byte of the file
    last: int  # the one after its own


def dtype_of(name: str, said: str, where: str) -> torch.dtype:
    if said not in DTYPES:
        raise SourceError(f"'{name}' in {where} has dtype {said}, not handled")
    return DTYPES[said]


def header_bytes(start: bytes, file_bytes: int) -> int:
    """How long the header is, from a file's first 8 bytes. Raises ValueError."""
    if len(start) < LENGTH_BYTES:
        raise ValueError("it is too short to have a header")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > _MOST_BYTES:
        raise ValueError(f"a header of {length} bytes, over safetensors' limit of {_MOST_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
    return length


def parse_header(header: bytes, file_bytes: int, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order in which they lie.

    Raises ValueError for a header that is not one, or does not fit its file; SourceError for a
    dtype that is not handled here.
    """
    entries = _entries(header)
    start = LENGTH_BYTES + len(header)
    ends = {name: _span(name, entry) for name, entry in entries.items()}
    found: dict[str, StoredTensor] = {}
    at = 0
    for name, (first, last) in sorted(ends.items(), key=lambda item: item[1]):
        if first != at or last < first:
            raise ValueError(f"'{name}' has the offsets {first} and {last}, not from {at} on")
        shape = _shape(name, entries[name])
        said = entries[name]["dtype"]
        if not isinstance(said, str):
            raise ValueError(f"'{name}' has no dtype")
        dtype = dtype_of(name, said, where)
        num_bytes = _product(name, (*shape, 8 * dtype.itemsize)) // 8
        if num_bytes != last - first:
            raise ValueError(f"'{name}' has {last - first} bytes for {list(shape)} of {said}")
        found[name] = StoredTensor(TensorInfo(dtype, shape), start + first, start + last)
        at = last
    if start + at != file_bytes:
        raise ValueError(f"its tensors end at byte {start + at} of {file_bytes}")
    return found


def _entries(header: bytes) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no mapping of names")
    facts = entries.pop("__metadata__", None)
    if facts is not None and not _all_texts(facts):
        raise ValueError("its __metadata__ is no mapping of texts")
    for name, entry in entries.items():
        name.encode("utf-8")  # half of a surrogate pair is no text
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"'{name}' has no dtype, shape and data_offsets")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in found if names.count(n) > 1)}' stands there twice")
    return found


def _whole(digits: str) -> int | float:
    return float(digits) if digits.startswith("-") else int(digits)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _all_texts(facts: Any) -> bool:
    return isinstance(facts, dict) and all(isinstance(text, str) for text in facts.values())


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n < _MOST_COUNTED for n in value)


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"'{name}' has no two data_offsets")
    return offsets[0], offsets[1]


def _shape(name: str, entry: Mapping[str, Any]) -> tuple[int, ...]:
    if not _counts(entry["shape"]):
        raise ValueError(f"'{name}' has no shape")
    return tuple(entry["shape"])


def _product(name: str, sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
        if product >= _MOST_COUNTED:
            raise ValueError(f"'{name}' has a shape beyond all memory")
    return product
