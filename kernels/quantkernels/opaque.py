"""Python functions as operators of torch's: torch.compile and torch.export look no deeper.

`torch.library.custom_op` would do, but for what it wraps every call in: where a linear took a
third of a millisecond of the host's time, for two operators and their launches, that was most of
it. These go straight from torch's dispatcher to the function.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from quantkernels.devices import on_its_device

_P = ParamSpec("_P")
_T = TypeVar("_T")


def opaque(name: str, fake: Callable[..., _T]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Make a function the operator of this name, for any device. It has no backward.

    Its arguments are annotated, tensors and numbers; it changes none of them, and what it returns
    shares no memory with them. It runs on the device of the first, a tensor. `fake` gives empty
    tensors of the same shapes, dtypes and strides.
    """

    def made(function: Callable[_P, _T]) -> Callable[_P, _T]:
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default", on_its_device(function))
        torch.library.register_fake(name, fake)
        space, _, own = name.partition("::")
        operator: Callable[_P, _T] = getattr(getattr(torch.ops, space), own).default
        return operator

    return made
