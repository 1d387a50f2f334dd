"""What kernels ask of a device, and that they run on it.

Triton launches on the current device, whichever the tensors are on: theirs is made current. A model
that is spread over several GPUs calls its linears without a word about devices, as it may with
torch's own operators.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def on_its_device(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs the function on the device of its first argument, which is given by its place."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        device = cast(Any, args[0]).device
        if device.type in ("cuda", "xpu"):
            accelerator: Any = getattr(torch, device.type)
            if device.index != accelerator.current_device():
                with accelerator.device(device):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A CUDA GPU's; of what is only compiled, on "meta", the current one's, or Hopper's."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
