"""SmoothQuant for one LinearGroup: which factors, and what they make of the norm before it.

Every worker that solves a part of the group comes to the same answer by itself: it is cheap
beside waiting for another's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.ranges import Ranges
from quantcore.smoothing import FoldedNorm, Reader, Smoothing, factors, fold, input_scale, search
from workers.plan import GroupPlan, Norm, Plan
from workers.sources import ModelSource


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of a group as its linears are served them."""

    ranges: Ranges  # before smoothing
    alpha: float | None
    factor_I: Tensor  # float32; ones where nothing is smoothed
    norm: dict[str, Tensor]  # the norm's new tensors by name, in values that it can store
    scale: float | None  # of static activations


def smooth_group(plan: Plan, group: GroupPlan, ranges: Ranges, source: ModelSource) -> GroupInputs:
    smoothing = Smoothing(None, torch.ones_like(ranges.low_I))
    norm: dict[str, Tensor] = {}
    if group.smoothed is not None:
        smoothing, norm = _into_norm(plan, group, group.smoothed, ranges, source)
    elif group.input_factor:
        smoothing = _choose(
            plan, _readers(group, ranges, source), ranges, lambda factor_I: factor_I
        )
    scale = None
    for layer in group.quantized():
        if layer.scheme is not None and layer.scheme.static:
            dtype = source.tensors[f"{layer.name}.weight"].dtype
            scale = input_scale(ranges, smoothing.factor_I, layer.scheme, dtype)
    return GroupInputs(ranges, smoothing.alpha, smoothing.factor_I, norm, scale)


def _into_norm(
    plan: Plan, group: GroupPlan, norm: Norm, ranges: Ranges, source: ModelSource
) -> tuple[Smoothing, dict[str, Tensor]]:
    device, readers = ranges.low_I.device, _readers(group, ranges, source)
    stored = {name: tensor.to(device) for name, tensor in source.read(norm.tensors())}

    def folded(factor_I: Tensor) -> FoldedNorm:
        bias_I = stored.get(f"{norm.name}.bias")
        return fold(stored[f"{norm.name}.weight"], bias_I, factor_I, norm.rule)

    chosen = _choose(plan, readers, ranges, lambda wanted_I: folded(wanted_I).factor_I)
    if chosen.alpha is None:
        return chosen, {}
    became = folded(factors(ranges, readers, chosen.alpha))
    new = {f"{norm.name}.weight": became.weight_I}
    if became.bias_I is not None:
        new[f"{norm.name}.bias"] = became.bias_I
    return chosen, new


def _readers(group: GroupPlan, ranges: Ranges, source: ModelSource) -> list[Reader]:
    weights = dict(source.read(f"{layer.name}.weight" for layer in group.layers))
    return [
        Reader(weights[f"{layer.name}.weight"].to(ranges.low_I.device), layer.scheme)
        for layer in group.layers
        if layer.scheme is not None
    ]


def _choose(
    plan: Plan, readers: list[Reader], ranges: Ranges, became: Callable[[Tensor], Tensor]
) -> Smoothing:
    """The job's own alpha, or the best one; `became` says what factors come to when stored."""
    alphas = plan.smoothquant.alphas
    if len(alphas) > 1:
        return search(ranges, readers, alphas, became)
    return Smoothing(alphas[0], became(factors(ranges, readers, alphas[0])))
