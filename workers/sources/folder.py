"""A Hugging Face folder with safetensors weights, in one file or listed by an index."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantcore.errors import SourceError
from workers.sources.base import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What never travels into an artifact: weights of any kind, code, and what we write ourselves.
_LEFT_BEHIND = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".ot"),
    *(".py", ".pyc", ".so", ".sh", ".ipynb"),
}
_WRITTEN_BY_US = {"config.json", INDEX, "manifest.json"}

_DTYPES = {
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


class SafetensorsFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _load_config(path)
        self._file_of: dict[str, Path] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _weight_files(path).items():
            found = _read_header(file)
            if expected is not None and (missing := sorted(expected - set(found))):
                raise SourceError(
                    f"{INDEX} says that {file.name} holds '{missing[0]}', and it does not"
                )
            for name, info in found.items():
                if name in self._file_of:
                    other = self._file_of[name].name
                    raise SourceError(f"'{name}' stands twice: in {other} and in {file.name}")
                tensors[name] = info
                self._file_of[name] = file
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        for file, inside in by_file.items():
            with _open(file) as handle:
                for name in inside:
                    yield name, handle.get_tensor(name)

    def config_json(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text("utf-8"))
        config.pop("auto_map", None)  # names code, and code does not travel
        return config

    def write_companions(self, folder: Path) -> list[str]:
        names = []
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in name.parts)
            if hidden or not file.is_file() or file.suffix.lower() in _LEFT_BEHIND:
                continue
            if name.name.endswith(".index.json") or str(name) in _WRITTEN_BY_US:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
            names.append(name.as_posix())
        return names

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise SourceError(f"{self.path} has no tokenizer that loads: {error}") from None


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise SourceError(f"{path} has no config.json: it is not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever a malformed config provokes
        raise SourceError(f"{path / 'config.json'} does not load: {_first_line(error)}") from None


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Each weight file with the tensors that the index expects in it (None without an index)."""
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise SourceError(f"{path} has neither {SINGLE} nor {INDEX}")
        return {path / SINGLE: None}
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names: dict[Path, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file:
                raise SourceError(f"{index} names a file outside its folder: '{file}'")
            expected = names.setdefault(path / file, set())
            assert expected is not None
            expected.add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is not a safetensors index: {_first_line(error)}") from None
    for file in names:
        if not file.is_file():
            raise SourceError(f"{INDEX} names {file.name}, which is not in {path}")
    return names


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes; safetensors itself checks them against the file's length."""
    with _open(file) as handle:
        infos = {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise SourceError(f"'{name}' in {file} has dtype {part.get_dtype()}, not handled")
            infos[name] = TensorInfo(dtype, tuple(part.get_shape()))
    return infos


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{file} is not a whole safetensors file: {_first_line(error)}. Fetch it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
