"""By what findings of one recorded model are known: each digest is taken once.

They are taken before anything is swapped: weights are the dense model's.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.digests import combined, of_model, of_statistics, of_tensor, of_value
from quantcore.autoquant.findings import PLAN, Finding
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme


class Keys:
    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        recorder: Recorder,
        held_out: Sequence[Any],
    ) -> None:
        self._model, self._held_out = model, held_out
        self._weights = {name: of_tensor(linear.weight) for name, linear in linears.items()}
        shared: dict[int, str] = {}
        for name in linears:
            statistics = recorder[name]
            shared.setdefault(id(statistics), of_statistics(statistics))
        self._samples = {name: shared[id(recorder[name])] for name in linears}
        if held_out:
            assert self._whole  # while it is dense

    @cached_property
    def _whole(self) -> str:
        known = {f"{name}.weight": digest for name, digest in self._weights.items()}
        return combined(of_model(self._model, known), of_value(self._held_out))

    def error(self, linear: str, scheme: Scheme) -> Finding:
        of = combined(self._weights[linear], self._samples[linear])
        return Finding(what="error", of=of, under=scheme.label())

    def of_scheme(self, scheme: Scheme, taking: Sequence[str]) -> Finding:
        """The whole model's divergence where these linears take it, plain."""
        of = combined(self._whole, *sorted(taking), *self._scales(taking, scheme))
        return Finding(what="divergence", of=of, under=scheme.label())

    def of_plan(self, labels: Mapping[str, str]) -> Finding:
        parts = [
            combined(name, label, *self._scales([name], candidate_of(label).scheme))
            for name, label in sorted(labels.items())
        ]
        return Finding(what="divergence", of=combined(self._whole, *parts), under=PLAN)

    def _scales(self, taking: Sequence[str], scheme: Scheme | None) -> list[str]:
        """What a static scheme's scales of inputs come from."""
        if scheme is None or not scheme.static:
            return []
        return [self._samples[name] for name in sorted(taking)]
