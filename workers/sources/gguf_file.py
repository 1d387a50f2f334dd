"""One GGUF file, dequantized a tensor at a time as it is read.

Which GGUF tensor is which checkpoint tensor, and how llama.cpp permuted it, is transformers'
knowledge: its maps are used here, so that a block read from the file equals what
`from_pretrained(gguf_file=...)` would have loaded, without ever holding the whole model.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcore.errors import SourceError
from workers.skeleton import empty_model
from workers.sources.base import TensorInfo

_COMPANION_BYTES = 2**25  # of a tokenizer that is written anew


class GgufFile:
    remote = False
    version = ""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        from gguf import GGUFReader
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
            read_field,
        )

        self.path = path
        self._dtype = dtype
        try:
            self._reader = GGUFReader(path)
            facts = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
            self.config = AutoConfig.for_model(**facts)
            architecture = read_field(self._reader, "general.architecture")[0]
            processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
            self._processor = processor(config=facts)
            skeleton = empty_model(self.config)
            self._class_name = type(skeleton).__name__
            names = get_gguf_hf_weights_map(_Names(skeleton), self._processor)
        except SourceError:
            raise
        except Exception as error:
            # gguf and transformers raise whatever a malformed file provokes
            raise SourceError(f"{path} does not read as a GGUF model: {error}") from None
        self._tensor_of = {
            names[tensor.name]: tensor for tensor in self._reader.tensors if tensor.name in names
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype, tuple(int(size) for size in reversed(tensor.shape)))
            for name, tensor in self._tensor_of.items()
        }

    def made_of(self) -> str:
        start = self._reader.data[: self._reader.data_offset]  # all before the tensors' values
        return hashlib.sha256(start.tobytes()).hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from gguf import dequantize

        for name in names:
            tensor = self._tensor_of[name]
            values = dequantize(tensor.data, tensor.tensor_type)
            values = self._processor.process(weights=values, name=tensor.name).weights
            yield name, torch.from_numpy(np.array(values)).to(self._dtype)

    def config_json(self) -> dict[str, Any]:
        config: dict[str, Any] = self.config.to_dict()
        config["architectures"] = [self._class_name]
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        config.pop("_name_or_path", None)
        return config

    def write_companions(self, folder: Path) -> list[str]:
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer().save_pretrained(scratch)
            files = sorted(Path(scratch).iterdir())
            for file in files:
                (folder / file.name).write_bytes(file.read_bytes())
        return [file.name for file in files]

    def companion_bytes(self) -> int:
        return _COMPANION_BYTES

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            # transformers draws a progress bar of its own while it converts the vocabulary
            with contextlib.redirect_stderr(io.StringIO()):
                return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:
            raise SourceError(f"{self.path} has no tokenizer that loads: {error}") from None


class _Names:
    """A model as transformers' name map wants it, without the descent into every submodule."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> list[Any]:
        return []
