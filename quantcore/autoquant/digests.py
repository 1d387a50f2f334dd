"""What a tensor, a recorded sample or a model holds, in a few letters: keys of what is found of it.

    sum over 64-bit words w_i of  mix(w_i + i g)  modulo 2^64,   g odd

with the finishing steps of SplitMix64 (Steele, Lea and Flood 2014, Fast Splittable Pseudorandom
Number Generators, section 3) for mix: every bit of a word, and where it stands, moves about half of
the sum's. Sums come in any order, so a device computes it as fast as it reads: whole numbers, the
same ones everywhere. It tells apart what differs by chance; who wants two tensors to be taken for
one can make them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.recorder import InputStatistics
from quantcore.tensors import QuantizedTensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_STEPS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
_WORDS_AT_ONCE = 1 << 22
_LETTERS = 24


def combined(*parts: object) -> str:
    """One key of several."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:_LETTERS]


def of_tensor(tensor: Tensor) -> str:
    if isinstance(tensor, QuantizedTensor):
        parts = (f"{name} {of_tensor(part)}" for name, part in tensor.parts().items())
        return combined(tensor.facts, *parts)
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    whole = flat.view(torch.uint8)
    count = len(whole) // 8
    words = whole[: 8 * count].view(torch.int64)
    rest = bytes(whole[8 * count :].tolist()).hex()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, count, _WORDS_AT_ONCE):
        total += _mixed(words[first : first + _WORDS_AT_ONCE], first).sum()
    return combined(tensor.dtype, tuple(tensor.shape), total.item(), rest)


def _mixed(words: Tensor, first: int) -> Tensor:
    places = torch.arange(first, first + len(words), device=words.device)
    mixed = places.mul_(_GOLDEN).add_(words)
    for shift, factor in _STEPS:
        mixed ^= (mixed >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # zeros come in from above
        mixed *= factor
    return mixed


def of_statistics(statistics: InputStatistics) -> str:
    """Of what errors are measured on: ranges, and their sample."""
    ranges = statistics.ranges
    assert ranges is not None
    return combined(*map(of_tensor, (ranges.sample_SI, ranges.low_I, ranges.high_I)))


def of_value(value: Any) -> str:
    """Of inputs as a model is called with them."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        return combined("mapping", *(f"{name} {of_value(of)}" for name, of in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return combined("sequence", *map(of_value, value))
    return combined(type(value).__name__, value)


def of_model(model: nn.Module, weights: Mapping[str, str]) -> str:
    """`weights` are the keys of its parameters that are known already, by name.

    What it computes is taken to be as it describes itself, and as its config does.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    devices = {str(tensor.device.type) for tensor in tensors.values()}
    told = (type(model).__qualname__, repr(model), getattr(model, "config", ""), sorted(devices))
    return combined(*told, *(f"{n} {weights.get(n) or of_tensor(t)}" for n, t in tensors.items()))
