"""What a model consists of, remembered: `inspect` needs transformers, whose import takes seconds.

It hangs on the config, on the tensors' names and shapes, and on the packages that build a model.
What is refused is not remembered.
"""

import dataclasses
import json
from typing import Any

from workers.architecture import Architecture, Attention, BlockInfo, LinearInfo, inspect
from workers.layout import dump
from workers.plan import Norm
from workers.remembered import Memory, entry_name, versions_of
from workers.sources import ModelSource

_VERSION = 1  # raised by hand whenever `inspect` would tell of the same model otherwise
_PACKAGES = ("transformers", "torch", "accelerate")


def architecture_of(source: ModelSource, memory: Memory) -> Architecture:
    """As `inspect` has it. Raises SourceError for what is refused."""
    made_of = source.made_of()
    hangs_on = {
        "version": _VERSION,
        "config": made_of,
        "tensors": {name: [str(t.dtype), *t.shape] for name, t in source.tensors.items()},
        "versions": versions_of(*_PACKAGES),
    }
    name = entry_name("model", hangs_on)
    known = memory.recall(name, _read)
    if known is None:
        known = inspect(source)
        if source.made_of() == made_of:  # and was when the config was read
            memory.keep(name, dump(dataclasses.asdict(known)))
    return known


def _read(data: bytes) -> Architecture:
    told = json.loads(data)
    told["blocks"] = tuple(map(_block, told["blocks"]))
    told["head"] = told["head"] and LinearInfo(**told["head"])
    told["attention"] = Attention(**told["attention"])
    return Architecture(**told)


def _block(told: dict[str, Any]) -> BlockInfo:
    groups = tuple(tuple(LinearInfo(**of) for of in group) for group in told["groups"])
    return BlockInfo(groups, tuple(norm and Norm(**norm) for norm in told["norms"]))
