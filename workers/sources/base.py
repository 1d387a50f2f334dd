"""What the rest of the house needs of a model, whatever it is stored as."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class ModelSource(Protocol):
    """A pretrained model that can be read a tensor at a time."""

    @property
    def path(self) -> Path | str:
        """Where it lies, as messages tell it."""
        ...

    @property
    def remote(self) -> bool:
        """Whether reading waits for a network: then blocks are read ahead on the CPU, too."""
        ...

    @property
    def version(self) -> str:
        """Another one once the model is another, where that can be told without reading it."""
        ...

    @property
    def config(self) -> Any:
        """A transformers.PretrainedConfig, read when it is first asked for. Raises SourceError."""
        ...

    def made_of(self) -> str:
        """A digest of the files that say what model and tokenizer are: not of the weights."""
        ...

    tensors: Mapping[str, TensorInfo]  # by checkpoint name

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, each in its stored dtype, on the CPU. Raises SourceError."""
        ...

    def config_json(self) -> dict[str, Any]:
        """The config as it will stand in the artifact."""
        ...

    def write_companions(self, folder: Path) -> list[str]:
        """Put every file that is neither weights, config nor code into `folder`; their names."""
        ...

    def companion_bytes(self) -> int:
        """How much that will be, at most."""
        ...

    def tokenizer(self) -> Any: ...
