"""Results' parts on their way between processes: tensors as arrays, which any process can read.

Within one process parts are handed on as they are, and stay on the device where they were made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(part: Any) -> Any:
    """A part with an array for each tensor."""
    return _mapped(part, Tensor, lambda tensor: tensor.cpu().numpy())


def unpacked(part: Any, device: torch.device) -> Any:
    """A part as it was before `packed`, on a device."""
    return _mapped(part, np.ndarray, lambda array: torch.tensor(array, device=device))


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
