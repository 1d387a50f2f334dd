"""A Hugging Face folder with safetensors weights, in one file or listed by an index."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantcore.errors import SourceError
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
from workers.sources.header import dtype_of


class SafetensorsFolder:
    remote = False
    version = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise SourceError(f"{path} has no {CONFIG}: it is not a Hugging Face model folder")
        self.config = load_config(path, str(path))
        expected = _weight_files(path)
        found = ((file, _read_header(path / file)) for file in expected)
        tensors, self._file_of = joined(found, expected)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        for file, inside in by_file.items():
            with _open(self.path / file) as handle:
                for name in inside:
                    yield name, handle.get_tensor(name)

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


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes; safetensors itself checks them against the file's length."""
    with _open(file) as handle:
        infos = {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            part = handle.get_slice(name)
            dtype = dtype_of(name, part.get_dtype(), str(file))
            infos[name] = TensorInfo(dtype, tuple(part.get_shape()))
    return infos


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{file} is not a whole safetensors file: {first_line(error)}. Fetch it again"
        ) from None
