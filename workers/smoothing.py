"""SmoothQuant for one LinearGroup: which factors, and what they make of the norm before it.

Every worker that solves a part of the group comes to the same answer by itself: it is cheap
beside waiting for another's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.ranges import Ranges
from quantcore.smoothing import (
    FoldedNorm,
    Reader,
    Smoothing,
    StoredNorm,
    input_scale,
    smooth,
)
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
    new: dict[str, Tensor] = {}
    if group.smoothed is not None or group.input_factor:
        norm = _stored(group.smoothed, source, ranges.low_I.device) if group.smoothed else None
        readers = _readers(group, ranges, source)
        smoothing, folded = smooth(ranges, readers, plan.smoothquant.alphas, norm)
        if group.smoothed is not None and folded is not None:
            new = _new_tensors(group.smoothed, folded)
    scale = None
    for layer in group.quantized():
        if layer.scheme is not None and layer.scheme.static:
            dtype = source.tensors[f"{layer.name}.weight"].dtype
            scale = input_scale(ranges, smoothing.factor_I, layer.scheme, dtype)
    return GroupInputs(ranges, smoothing.alpha, smoothing.factor_I, new, scale)


def _stored(norm: Norm, source: ModelSource, device: torch.device) -> StoredNorm:
    stored = {name: tensor.to(device) for name, tensor in source.read(norm.tensors())}
    return StoredNorm(stored[f"{norm.name}.weight"], stored.get(f"{norm.name}.bias"), norm.rule)


def _new_tensors(norm: Norm, folded: FoldedNorm) -> dict[str, Tensor]:
    new = {f"{norm.name}.weight": folded.weight_I}
    if folded.bias_I is not None:
        new[f"{norm.name}.bias"] = folded.bias_I
    return new


def _readers(group: GroupPlan, ranges: Ranges, source: ModelSource) -> list[Reader]:
    weights = dict(source.read(f"{layer.name}.weight" for layer in group.layers))
    return [
        Reader(weights[f"{layer.name}.weight"].to(ranges.low_I.device), layer.scheme)
        for layer in group.layers
        if layer.scheme is not None
    ]
