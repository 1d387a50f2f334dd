"""Linears that are handed the same input, multiplied as one weight: fewer and larger products.

    join_linears(model)   # q_proj, k_proj and v_proj of each attention; gate_proj and up_proj

The rows of the weights are put one below the other, which changes no value. The first of them
multiplies, the others take what it has for them: so the module that owns them may go on calling
each by its name, in any order that begins with the first. For serving: their state is no longer a
checkpoint's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import QuantizationError
from quantcore.tensors import Layout, QuantizedTensor, relayout

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SHARED = ("input_scale", "input_factor")


class Joined(nn.Module):
    """The first of some linears: all their rows."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = _one_below_the_other([linear.weight for linear in linears])
        self.weight = nn.Parameter(weight, requires_grad=False)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._rows = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._others: list[Tensor | None] = []  # till each is asked for

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        first, *others = torch.split(y, self._rows, dim=-1)
        self._input, self._others = x, list(others)
        return first

    def part(self, number: int, x: Tensor) -> Tensor:
        y = self._others[number] if x is self._input else None
        if y is None:
            raise QuantizationError(
                "joined linears were handed different inputs: leave them out of join_linears"
            )
        self._others[number] = None
        if all(other is None for other in self._others):
            self._input = None
        return y


class Part(nn.Module):
    """One of the others."""

    def __init__(self, joined: Joined, number: int) -> None:
        super().__init__()
        self._joined = (joined,)  # in a tuple, or it would be a module of this one
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._joined[0].part(self._number, x)
        return y


def join_linears(model: nn.Module, together: Iterable[Sequence[str]] = TOGETHER) -> list[str]:
    """Join what can be; the names of the joined linears' owners, with the first one's.

    Linears whose weights are of one scheme, layout and dtype can, or of one dense dtype; with the
    same static scale and smoothing of their inputs; all with a bias or none.
    """
    found = joinable(model, together)
    for names in found:
        owner_name, _, first = names[0].rpartition(".")
        owner = model.get_submodule(owner_name)
        joined = Joined([model.get_submodule(name) for name in names])  # type: ignore[misc]
        setattr(owner, first, joined)
        for number, name in enumerate(names[1:]):
            setattr(owner, name.rpartition(".")[2], Part(joined, number))
    return [names[0] for names in found]


def joinable(
    model: nn.Module, together: Iterable[Sequence[str]] = TOGETHER
) -> list[tuple[str, ...]]:
    """The names of linears that `join_linears` makes one of, as they are now."""
    found = []
    for owner_name, owner in model.named_modules():
        for names in together:
            linears = [getattr(owner, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears) and _alike(linears):
                found.append(tuple(f"{owner_name}.{name}".lstrip(".") for name in names))
    return found


def _alike(linears: Sequence[Any]) -> bool:
    first, *others = (linear.weight for linear in linears)
    if len({linear.bias is None for linear in linears}) > 1:
        return False
    if not isinstance(first, QuantizedTensor):
        return all(
            not isinstance(other, QuantizedTensor) and other.dtype == first.dtype
            for other in others
        )
    return all(isinstance(other, QuantizedTensor) and _fits(first, other) for other in others)


def _fits(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    told = [(t.scheme, t.layout_name, t.dtype, t.facts.transposed) for t in (one, other)]
    if told[0] != told[1]:
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in _SHARED]
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in pairs
    )


def _one_below_the_other(weights: Sequence[Tensor]) -> Tensor:
    first = weights[0]
    if not isinstance(first, QuantizedTensor):
        return torch.cat([weight.detach() for weight in weights])
    plain = [relayout(weight, Layout.PLAIN) for weight in weights]  # type: ignore[arg-type]

    def joined(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in _SHARED else torch.cat([getattr(w, name) for w in plain])

    rows = sum(weight.facts.features[0] for weight in plain)
    whole = plain[0].mapped(joined, features=(rows, plain[0].facts.features[1]))
    return relayout(whole, first.layout_name)
