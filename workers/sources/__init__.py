"""Where a model comes from. A new kind of source is one file and one line in `open_source`."""

from pathlib import Path

import torch

from quantcore.errors import SourceError, StoreError
from workers.sources.base import ModelSource, TensorInfo
from workers.sources.folder import SafetensorsFolder
from workers.sources.gguf_file import GgufFile
from workers.sources.remote import AHEAD_BYTES, RemoteFolder
from workers.store import STORE_PATIENCE_S, S3Store, open_store

__all__ = ["AHEAD_BYTES", "ModelSource", "TensorInfo", "open_source"]


def open_source(
    place: Path | str, gguf_dtype: torch.dtype = torch.float32, *, patience_s: float = 0.0
) -> ModelSource:
    """Read a model's config and headers, never its weights. Raises SourceError.

    `patience_s` is for opening it; what is read of it later is asked for as long as a store is.
    """
    if str(place).startswith("s3://"):
        return _open_remote(str(place), patience_s)
    path = Path(place)
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path, gguf_dtype)
    if path.exists():
        raise SourceError(f"{path} is neither a Hugging Face folder nor a .gguf file")
    raise SourceError(f"there is no {path}: name a Hugging Face folder or a .gguf file")


def _open_remote(url: str, patience_s: float) -> ModelSource:
    try:
        store = open_store(url, patience_s=patience_s)
    except StoreError as error:
        raise SourceError(str(error)) from None
    assert isinstance(store, S3Store)
    source = RemoteFolder(store)
    store.patience_s = max(patience_s, STORE_PATIENCE_S)
    return source
