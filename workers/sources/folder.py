"""A Hugging Face folder with safetensors weights, in one file or listed by an index."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantcore.errors import SourceError
from workers.layout import hash_file
from workers.sources.base import TensorInfo
from workers.sources.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Expected,
    companions,
    config_json,
    copy_companions,
    first_line,
    indexed_files,
    joined,
    load_config,
    load_tokenizer,
)
from workers.sources.header import LENGTH_BYTES, StoredTensor, header_bytes, parse_header

PIECE_BYTES = 1 << 21  # of a tensor that is looked at: they stay in a core's cache


class SafetensorsFolder:
    remote = False
    version = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise SourceError(f"{path} has no {CONFIG}: it is not a Hugging Face model folder")
        expected = _weight_files(path)
        found = ((file, _read_header(path / file)) for file in expected)
        self._stored, self._file_of = joined(found, expected)
        self.tensors: Mapping[str, TensorInfo] = {n: t.info for n, t in self._stored.items()}

    @cached_property
    def config(self) -> Any:
        return load_config(self.path, str(self.path))

    def made_of(self) -> str:
        digest = hashlib.sha256()
        for file in [self.path / CONFIG, *companions(self.path)]:
            try:
                found, _ = hash_file(file)
            except OSError as error:
                raise SourceError(f"cannot read {file}: {error.strerror or error}") from None
            digest.update(f"{found} {file.relative_to(self.path).as_posix()}\n".encode())
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        for file, inside in by_file.items():
            with _open(self.path / file) as handle:
                for name in inside:
                    yield name, handle.get_tensor(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's values in their order, flat, each piece in the memory of the one before.

        To look at them once. On a machine of 16 cores that share a mapped file, its pages' faults
        take as long as hashing does.
        """
        stored, file = self._stored[name], self.path / self._file_of[name]
        left = stored.last - stored.first
        memory = bytearray(min(left, PIECE_BYTES))
        with file.open("rb", buffering=0) as opened:
            opened.seek(stored.first)
            while left:
                piece = memoryview(memory)[:left]
                if _filled(opened, piece) < len(piece):
                    raise SourceError(f"{file} ends within '{name}'. Fetch it again")
                yield torch.frombuffer(piece, dtype=stored.info.dtype)
                left -= len(piece)

    def config_json(self) -> dict[str, Any]:
        return config_json(self.path)

    def write_companions(self, folder: Path) -> list[str]:
        return copy_companions(self.path, folder)

    def companion_bytes(self) -> int:
        return sum(file.stat().st_size for file in companions(self.path))

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path, str(self.path))


def _weight_files(path: Path) -> Expected:
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise SourceError(f"{path} has neither {SINGLE} nor {INDEX}")
        return {SINGLE: None}
    try:
        text = index.read_text("utf-8")
    except ValueError as error:
        raise SourceError(f"{index} is not a safetensors index: {first_line(error)}") from None
    files = indexed_files(text, str(index))
    for file in files:
        if not (path / file).is_file():
            raise SourceError(f"{INDEX} names {file}, which is not in {path}")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes, shapes and places; safetensors itself has the first word on the file."""
    with _open(file), file.open("rb") as opened:
        size = file.stat().st_size
        try:
            header = opened.read(header_bytes(opened.read(LENGTH_BYTES), size))
            return parse_header(header, size, str(file))
        except ValueError as error:
            raise _not_whole(file, error) from None


def _filled(opened: FileIO, memory: memoryview) -> int:
    """Read until the memory is full or the file ends; how much that was."""
    filled = 0
    while filled < len(memory) and (count := opened.readinto(memory[filled:])):
        filled += count
    return filled


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _not_whole(file, error) from None


def _not_whole(file: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{file} is not a whole safetensors file: {first_line(error)}. Fetch it again"
    )
