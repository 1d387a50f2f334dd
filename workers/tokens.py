"""A model's tokenizer that remembers what texts came to.

Calibration needs a few thousand tokens spread over a text, and what stands where shows only once
all of it is tokenized: seconds for millions of characters, after those that loading a tokenizer
takes. What a text comes to hangs on the text, on the files that say what the tokenizer is, and on
the packages that read them.
"""

import hashlib
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load, save

from quantcore.errors import SourceError
from workers.remembered import Memory, entry_name, versions_of
from workers.sources import ModelSource

# What has fewer characters is tokenized as soon as looked up; and documents, too many to keep each
# one, mostly have fewer.
SHORT = 1 << 14
_PACKAGES = ("transformers", "tokenizers", "sentencepiece", "tiktoken")


class KnownTokenizer:
    """Called as transformers' own, which is loaded when it is first needed.

    Raises SourceError, of the field model.path, if it does not load then.
    """

    def __init__(self, source: ModelSource, memory: Memory) -> None:
        self._source = source
        self.memory = memory
        self._changed = False  # between the look at its files and its loading

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        if len(text) < SHORT:
            return self._tokenized(text, options)
        hangs_on = {
            "tokenizer": self._made_of,
            "text": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "options": options,
            "versions": versions_of(*_PACKAGES),
        }
        name = entry_name("tokens", hangs_on)
        known: list[int] | None = self.memory.recall(name, _read)
        if known is not None:
            return {"input_ids": known}
        found = self._tokenized(text, options)
        if not self._changed:
            ids = torch.tensor(found["input_ids"], dtype=torch.int32)
            self.memory.keep(name, save({"ids": ids}))
        return found

    def __len__(self) -> int:
        return len(self._tokenizer)

    @cached_property
    def _made_of(self) -> str:
        return self._source.made_of()

    @cached_property
    def _tokenizer(self) -> Any:
        made_of = self._made_of
        try:
            loaded = self._source.tokenizer()
        except SourceError as error:
            raise SourceError(f"model.path: {error}") from None
        self._changed = self._source.made_of() != made_of
        return loaded

    def _tokenized(self, text: str, options: dict[str, Any]) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer(text, **options)["input_ids"]}


def _read(data: bytes) -> list[int]:
    ids: list[int] = load(data)["ids"].tolist()
    return ids
