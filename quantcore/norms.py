"""How a norm uses its weight, found by trying it alone on a few numbers: no class is known by name.

Shape suffixes: T = tokens, I = width of the norm.
"""

import copy
from typing import Any

import torch
from torch import nn

from quantcore.smoothing import NormRule, fold

_TRIED_TOKENS = 4


def norm_rule(norm: nn.Module) -> NormRule | None:
    """How a norm's output is divided through its weight (and bias); None if it cannot be."""
    trial: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        weight_I, bias_I = trial.weight.clone(), getattr(trial, "bias", None)
        bias_I = None if bias_I is None else bias_I.clone()
        factor_I = 0.5 + torch.rand(weight_I.shape, generator=generator)
        x_TI = torch.randn(_TRIED_TOKENS, len(weight_I), generator=generator)
        before_TI = trial(x_TI)
        rules: tuple[NormRule, ...] = ("scale", "offset")
        for rule in rules:
            folded = fold(weight_I, bias_I, factor_I, rule)
            trial.weight.copy_(folded.weight_I)
            if folded.bias_I is not None:
                trial.bias.copy_(folded.bias_I)
            if torch.allclose(trial(x_TI) * folded.factor_I, before_TI, rtol=1e-4, atol=1e-5):
                return rule
    return None
