"""The header of a safetensors file, held to safetensors' own verdict on the same bytes."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from quantcore.errors import SourceError
from workers.sources.header import DTYPES, header_bytes, parse_header

_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U16": 2, "C64": 8}
Found = dict[str, tuple[str, tuple[int, ...], bytes]]


def _ours(data: bytes) -> Found | None:
    """By name dtype, shape and bytes; None for a file that is refused."""
    try:
        length = header_bytes(data[:8], len(data))
        tensors = parse_header(data[8 : 8 + length], len(data), "it")
    except ValueError:
        return None
    said = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (said[t.info.dtype], t.info.shape, data[t.first : t.last])
        for name, t in tensors.items()
    }


def _theirs(data: bytes) -> Found | None:
    try:
        tensors = deserialize(data)
    except SafetensorError:
        return None
    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in tensors}


def _file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_names = st.text(st.characters(codec="utf-8"), max_size=4)
_shapes = st.lists(st.integers(0, 4), max_size=3)
_tensors = st.lists(
    st.tuples(_names, st.sampled_from(sorted(_ITEM_BYTES)), _shapes),
    max_size=5,
    unique_by=lambda tensor: tensor[0],
)
_odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([2**63, 2**64, 2**64 - 1, 2**61, 0.0, 4.0, -0.0, 1e300]),
    st.text(max_size=3),
    st.lists(st.sampled_from([0, 1, 4, -1, 2**63, 1.0, "1", None, True]), max_size=4),
    st.dictionaries(st.sampled_from(["a", "dtype"]), st.sampled_from([1, "b", None]), max_size=2),
)


def _laid_out(tensors: list[tuple[str, str, list[int]]]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in tensors:
        count = 1
        for size in shape:
            count *= size
        last = at + count * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, last]}
        at = last
    return header, bytes(n % 251 for n in range(at))


@settings(max_examples=150, deadline=None)
@given(_tensors, st.data())
def test_a_file_is_taken_if_safetensors_takes_it(
    tensors: list[tuple[str, str, list[int]]], data: st.DataObject
) -> None:
    header, content = _laid_out(tensors)
    change = data.draw(st.sampled_from(["none", "field", "new", "metadata", "tail", "length"]))
    file = _file(header, content)
    if change == "field" and header:
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        entry[key] = data.draw(_odd)
        file = _file(header, content)
    elif change == "new":
        file = _file({**header, data.draw(_names): data.draw(_odd)}, content)
    elif change == "metadata":
        file = _file({"__metadata__": data.draw(_odd), **header}, content)
    elif change == "tail":
        file = file[: data.draw(st.integers(0, len(file)))] + data.draw(st.binary(max_size=9))
    elif change == "length":
        length = data.draw(st.one_of(st.integers(0, len(file) + 9), st.integers(0, 2**64 - 1)))
        file = struct.pack("<Q", length) + file[8:]
    _hold_to_theirs(file)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_header_with_a_byte_of_another_kind_too(data: st.DataObject) -> None:
    header, content = _laid_out([("a", "F32", [2, 1]), ("b", "BF16", [3]), ("ä", "I8", [])])
    text = bytearray(json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    byte = data.draw(st.sampled_from([*b'{}[]":,-0e.\\u \n\t', 0, 0xED, 0xFF, 0xC3]))
    if data.draw(st.booleans()):
        text[at] = byte
    else:
        text.insert(at, byte)
    _hold_to_theirs(_file(bytes(text), content))


def _hold_to_theirs(file: bytes) -> None:
    theirs = _theirs(file)
    try:
        ours = _ours(file)
    except SourceError as error:  # a dtype that safetensors knows, and a job can't use
        assert "not handled" in str(error)
        assert theirs is None or any(dtype not in DTYPES for dtype, _, _ in theirs.values())
        return
    assert ours == theirs


_ONE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
_ENTRY = json.dumps(_ONE["a"]).encode()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a": ' + _ENTRY + b', "a": ' + _ENTRY + b"}", "'a' stands there twice"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "not from 0 on"),
        ({**_ONE, "b": {**_ONE["a"]}}, "'b' has the offsets 0 and 4, not from 4 on"),
        ({"a": {**_ONE["a"], "shape": [2]}}, r"'a' has 4 bytes for \[2\] of F32"),
        ({"a": {**_ONE["a"], "shape": [2**62, 2**62, 0]}}, "a shape beyond all memory"),
        ({}, "its tensors end at byte 10 of 14"),
        (b"[1]", "no mapping of names"),
        (b"\xff\xff", "utf-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no JSON"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(header: Any, says: str) -> None:
    file = _file(header, bytes(4))
    length = header_bytes(file[:8], len(file))
    with pytest.raises(ValueError, match=says):
        parse_header(file[8 : 8 + length], len(file), "it")


def test_a_dtype_that_is_not_handled_is_named() -> None:
    header = json.dumps({"a": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(SourceError, match="'a' in it has dtype U16, not handled"):
        parse_header(header, 8 + len(header) + 4, "it")


@pytest.mark.parametrize(
    ("start", "size", "says"),
    [
        (b"", 0, "too short"),
        (b"\x01\0\0", 3, "too short"),
        (struct.pack("<Q", 100), 50, "a header of 100 bytes in a file of 50"),
        (struct.pack("<Q", 10**9), 10**12, "over safetensors' limit"),
        (b"\xff" * 8, 10**12, "over safetensors' limit"),
    ],
)
def test_a_header_that_cannot_be_is_not_asked_for(start: bytes, size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        header_bytes(start, size)
