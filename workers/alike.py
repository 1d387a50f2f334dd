"""Whether modules of a model differ in their place and their numbers alone."""

from collections.abc import Hashable
from types import FunctionType

from torch import nn


def looks(module: nn.Module) -> Hashable:
    """The same for modules that compute the same, but for the numbers they compute with.

    Classes, shapes, dtypes and settings of a module and of all inside it; a layer's number is none.
    """
    return tuple(
        (
            name,
            type(inner),
            tuple((n, p.shape, p.dtype) for n, p in inner.named_parameters(recurse=False)),
            tuple(
                (setting, value)
                for setting, value in sorted(vars(inner).items())
                if isinstance(value, bool | int | float | str | FunctionType)
                and setting != "layer_idx"
            ),
        )
        for name, inner in module.named_modules()
    )
