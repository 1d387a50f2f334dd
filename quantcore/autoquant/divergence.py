"""How far a whole model's predictions move: a check of what linears' errors add up to.

    KL(p, q) = mean over held-out tokens of  sum over words v of p_v (log p_v - log q_v)

in nats a token, p the dense model's and q the other's. A sum of output errors has no unit, and
rounded inputs weigh otherwise in a model than rounded weights: so a scheme's errors are scaled by
one factor, that with which they add up to what the model moves under this scheme alone, measured.
A plan's own divergence is then predicted, from the sum of its linears' scaled errors, and measured.

Shape suffixes: T = tokens, V = words.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import QuantizationError

_ROWS = 512  # whose logits are compared at once, in float32


class HeldOut:
    """Of one model, which is dense when this is made; held-out inputs as it is called with them.

    An input is a tensor, or a mapping of keyword arguments. All their logits are kept.
    """

    def __init__(self, model: nn.Module, held_out: Sequence[Any]) -> None:
        self._model, self._held_out = model, held_out
        self._dense = [self._logits(given) for given in held_out]

    def divergence(self) -> float:
        """Of the model as it is now."""
        total, tokens = 0.0, 0
        for given, dense_TV in zip(self._held_out, self._dense, strict=True):
            now_TV = self._logits(given)
            for p_TV, q_TV in zip(_parts(dense_TV), _parts(now_TV), strict=True):
                log_p_TV, log_q_TV = (t.double().log_softmax(-1) for t in (p_TV, q_TV))
                total += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum().item()
            tokens += len(dense_TV)
        divergence = total / tokens
        if not math.isfinite(divergence):
            raise QuantizationError("held_out: logits are not finite: hand over other inputs")
        return max(0.0, divergence)

    @torch.no_grad()
    def _logits(self, given: Any) -> Tensor:
        output = self._model(**given) if isinstance(given, Mapping) else self._model(given)
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if not isinstance(logits, Tensor):
            raise QuantizationError(
                f"held_out: the model gives a {type(output).__name__}, which has no logits: leave "
                "held_out away for a model that predicts no words"
            )
        return logits.detach().flatten(0, -2)


def _parts(logits_TV: Tensor) -> Sequence[Tensor]:
    return torch.split(logits_TV, _ROWS)


@contextmanager
def undone(model: nn.Module, linears: Iterable[str]) -> Iterator[None]:
    """These linears and their weights are as before, once it is left."""
    before = {name: model.get_submodule(name) for name in linears}
    weights = {name: linear.weight for name, linear in before.items()}
    try:
        yield
    finally:
        for name, linear in before.items():
            place(model, name, linear)
            linear.weight = weights[name]


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
