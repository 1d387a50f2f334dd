"""Parts of a block's forward that one kernel does in place of several, found by trying them.

No class is known by name: a norm, or a gated MLP, is run on random numbers beside the kernel that
would stand for it, and keeps its own forward unless the two agree. A job's contract names the
kernels (quantkernels/bits.py). Shape suffixes: B = 1, T = tokens, I = in_features.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from quantkernels.forward import NormForm, rms_norm, silu_product
from torch import Tensor, nn

from workers.norms import may_be_norm

# Tokens from so small that an epsilon counts to so large that a clamp would show
_TRIED_SCALES = (1e-3, 1e-2, 0.1, 1.0, 1.0, 1.0, 3.0, 30.0)
_FORMS: tuple[NormForm, ...] = ("scale", "offset")

Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def fuse(block: nn.Module) -> list[str]:
    """Give a block's modules the kernels that compute what they do; the names of those modules."""
    fused = []
    for name, module in block.named_modules():
        width, candidates = _candidates(module)
        if not candidates:
            continue
        x_BTI = _trial(width, next(module.parameters()))
        wanted_BTI = module(x_BTI)
        fitting = (forward for forward in candidates if _agree(forward(x_BTI), wanted_BTI))
        if (forward := next(fitting, None)) is not None:
            module.forward = forward
            fused.append(name)
    return fused


def _candidates(module: nn.Module) -> tuple[int, list[Forward]]:
    """A module's width, and what its forward might be."""
    if may_be_norm(module):
        return len(module.get_parameter("weight")), list(_norms(module))
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    if len(linears) != 3:
        return 0, []
    return linears[0].in_features, list(_gated(*linears))


def _norms(norm: nn.Module) -> Iterator[Forward]:
    if getattr(norm, "bias", None) is not None:
        return
    weight_I = norm.get_parameter("weight")
    epsilons = {value for value in vars(norm).values() if isinstance(value, float)}
    for eps in sorted(epsilons):
        for form in _FORMS:
            yield partial(rms_norm, weight_I=weight_I, eps=eps, form=form)


def _gated(first: nn.Linear, second: nn.Linear, down: nn.Linear) -> Iterator[Forward]:
    if first.weight.shape == second.weight.shape and down.in_features == first.out_features:
        yield partial(_gated_forward, first, second, down)
        yield partial(_gated_forward, second, first, down)


def _gated_forward(gate: nn.Linear, up: nn.Linear, down: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = down(silu_product(gate(x), up(x)))
    return y


def _trial(width: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    scale_T1 = torch.tensor(_TRIED_SCALES, device=like.device)[:, None]
    x_TI = torch.randn(len(scale_T1), width, generator=generator, device=like.device)
    return (x_TI * scale_T1)[None].to(like.dtype)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """But for roundings, token by token: far closer than another function would come by chance."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    off_BT = (found.float() - wanted.float()).norm(dim=-1)
    return bool((off_BT <= 2 * torch.finfo(wanted.dtype).eps * wanted.float().norm(dim=-1)).all())
