"""Results' parts on their way between processes.

As arrays any process can read them. On GPUs of one machine a process is lent another's memory
instead (kept.py), and copies it to its own. Within one process parts are handed on as they are, and
stay on the device where they were made.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

_DEVICE = 6  # among what torch hands over with a tensor: its GPU, by a number in its own process


@dataclass(frozen=True, slots=True)
class Lent:
    """A tensor on a GPU, to be mapped once by one other process while its owner keeps it."""

    gpu: str  # by a name that is its alone
    words: tuple[Any, ...]  # of torch's to itself


def lent(tensor: Tensor) -> Lent:
    """Where a tensor on a GPU is, for one other process of this machine."""
    gpu = str(torch.cuda.get_device_properties(tensor.device).uuid)
    _, words = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return Lent(gpu, words)


def borrowed(what: Lent) -> Tensor:
    """The owner's own memory, which must outlive this tensor."""
    numbers = range(torch.cuda.device_count())
    gpus = [str(torch.cuda.get_device_properties(number).uuid) for number in numbers]
    words = list(what.words)
    words[_DEVICE] = gpus.index(what.gpu)
    tensor: Tensor = rebuild_cuda_tensor(*words)  # type: ignore[no-untyped-call]
    return tensor


def packed(part: Any) -> Any:
    """A part with an array for each tensor."""
    return mapped(part, Tensor, lambda tensor: tensor.cpu().numpy())


def unpacked(part: Any, device: torch.device) -> Any:
    """A part as it was before `packed`, or another's, on a device, in memory of its own."""
    arrived = mapped(part, np.ndarray, lambda array: torch.tensor(array, device=device))
    return mapped(arrived, Tensor, lambda tensor: tensor.to(device))


def size_of(part: Any) -> int:
    """Bytes of its tensors."""
    sizes: list[int] = []
    mapped(part, Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A part with all of a kind in it changed: in dicts, tuples and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, kind, change) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(mapped(inner, kind, change) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **mapped(fields, kind, change))
    return value
