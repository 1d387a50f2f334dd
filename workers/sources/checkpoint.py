"""What Hugging Face checkpoints have in common, whether they lie in a folder or in a bucket."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from quantcore.errors import SourceError

T = TypeVar("T")

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What never travels into an artifact: weights of any kind, code, and what we write ourselves.
_LEFT_BEHIND = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".ot"),
    *(".py", ".pyc", ".so", ".sh", ".ipynb"),
}
_WRITTEN_BY_US = {CONFIG, INDEX, "manifest.json"}

Expected = dict[str, set[str] | None]  # by weight file: the tensors that the index says it holds


def is_companion(name: str) -> bool:
    """Whether a file of a checkpoint, named from its root, belongs into the artifact as it is."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    ours = name in _WRITTEN_BY_US or path.name.endswith(".index.json")
    return not ours and path.suffix.lower() not in _LEFT_BEHIND


def indexed_files(text: str, where: str) -> Expected:
    """What the index says. No file that it names lies outside its folder."""
    files: Expected = {}
    try:
        for tensor, file in json.loads(text)["weight_map"].items():
            if PurePosixPath(file).name != file or "\0" in file:
                raise SourceError(f"{where} names a file outside its folder: '{file}'")
            expected = files.setdefault(file, set())
            assert expected is not None
            expected.add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{where} is not a safetensors index: {first_line(error)}") from None
    return files


def joined(
    files: Iterable[tuple[str, Mapping[str, T]]], expected: Expected
) -> tuple[dict[str, T], dict[str, str]]:
    """The tensors of all files, and the file that each is in."""
    tensors: dict[str, T] = {}
    file_of: dict[str, str] = {}
    for file, found in files:
        wanted = expected[file]
        if wanted is not None and (missing := sorted(wanted - set(found))):
            raise SourceError(f"{INDEX} says that {file} holds '{missing[0]}', and it does not")
        for name, tensor in found.items():
            if name in file_of:
                raise SourceError(f"'{name}' stands twice: in {file_of[name]} and in {file}")
            tensors[name] = tensor
            file_of[name] = file
    return tensors, file_of


def load_config(folder: Path, where: str) -> Any:
    """As transformers reads it from `folder`; errors say `where` it came from."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever a malformed config provokes
        raise SourceError(f"{where}/{CONFIG} does not load: {first_line(error)}") from None


def load_tokenizer(folder: Path, where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"{where} has no tokenizer that loads: {error}") from None


def config_json(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    config.pop("auto_map", None)  # names code, and code does not travel
    return config


def companions(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in files if is_companion(file.relative_to(folder).as_posix())]


def copy_companions(folder: Path, target: Path) -> list[str]:
    names = []
    for file in companions(folder):
        name = file.relative_to(folder)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
        names.append(name.as_posix())
    return names


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
