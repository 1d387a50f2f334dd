"""Results' parts on their way between processes.

As arrays any process can read them. On GPUs of one machine a process is lent another's memory
instead, and copies it to its own. Within one process parts are handed on as they are, and stay on
the device where they were made.
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
    """A tensor on a GPU, to be read once by one other process while its owner keeps it."""

    gpu: str  # by a name that is its alone
    words: tuple[Any, ...]  # of torch's to itself


def lent(part: Any) -> Any:
    """A part with a word of where it is for each tensor on a GPU; others as arrays."""
    return _mapped(part, Tensor, _lent)


def borrowed(part: Any) -> Any:
    """A part whose tensors on GPUs are the owner's own memory, to be copied and forgotten."""
    return _mapped(part, Lent, _borrowed)


def packed(part: Any) -> Any:
    """A part with an array for each tensor."""
    return _mapped(part, Tensor, lambda tensor: tensor.cpu().numpy())


def unpacked(part: Any, device: torch.device) -> Any:
    """A part as it was before `packed`, or a borrowed one, on a device, in memory of its own."""
    arrived = _mapped(part, np.ndarray, lambda array: torch.tensor(array, device=device))
    return _mapped(arrived, Tensor, lambda tensor: tensor.to(device))


def size_of(part: Any) -> int:
    """Bytes of its tensors."""
    sizes: list[int] = []
    _mapped(part, Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def _lent(tensor: Tensor) -> Any:
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    gpu = str(torch.cuda.get_device_properties(tensor.device).uuid)
    _, words = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return Lent(gpu, words)


def _borrowed(what: Lent) -> Tensor:
    numbers = range(torch.cuda.device_count())
    gpus = [str(torch.cuda.get_device_properties(number).uuid) for number in numbers]
    words = list(what.words)
    words[_DEVICE] = gpus.index(what.gpu)
    tensor: Tensor = rebuild_cuda_tensor(*words)  # type: ignore[no-untyped-call]
    return tensor


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, kind, change) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(inner, kind, change) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_mapped(fields, kind, change))
    return value
