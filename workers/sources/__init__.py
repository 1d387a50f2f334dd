"""Where a model comes from. A new kind of source is one file and one line in `open_source`."""

from pathlib import Path

import torch

from quantcore.errors import SourceError
from workers.sources.base import ModelSource, TensorInfo
from workers.sources.folder import SafetensorsFolder
from workers.sources.gguf_file import GgufFile

__all__ = ["ModelSource", "TensorInfo", "open_source"]


def open_source(path: Path, gguf_dtype: torch.dtype = torch.float32) -> ModelSource:
    """Read a model's config and headers, never its weights. Raises SourceError."""
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path, gguf_dtype)
    if path.exists():
        raise SourceError(f"{path} is neither a Hugging Face folder nor a .gguf file")
    raise SourceError(f"there is no {path}: name a Hugging Face folder or a .gguf file")
