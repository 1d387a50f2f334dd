"""Parts of a block's forward that one kernel does in place of several, found by trying them.

No class is known by name: a norm, a gated MLP or a rotary embedding is run on random numbers beside
the kernel that would stand for it, and stays as it is unless the two agree. A job's contract names
the kernels (quantkernels/bits.py). Shape suffixes: B = 1, T = tokens, I = in_features, H = heads,
D = values of a head.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from quantkernels.forward import NormForm, rms_norm, rotated, silu_product
from torch import Tensor, nn

from workers.alike import looks
from workers.norms import may_be_norm

# Tokens from so small that an epsilon counts to so large that a clamp would show
_TRIED_SCALES = (1e-3, 1e-2, 0.1, 1.0, 1.0, 1.0, 3.0, 30.0)
_FORMS: tuple[NormForm, ...] = ("scale", "offset")

_ROTARY = "apply_rotary_pos_emb"  # as transformers' modules call the function, whatever it does
_ROTARY_TRIAL = (2, 8, 64)  # heads, tokens, values of a head

Forward = Callable[[Tensor], Tensor]
Tried = dict[Hashable, int | None]  # by what a module looks like: the candidate that fits


@torch.no_grad()
def fuse(block: nn.Module, tried: Tried | None = None) -> list[str]:
    """Give a block's modules the kernels that compute what they do; the names of those modules.

    A module that looks like one in `tried` is taken to compute the same; others are added there.
    """
    tried = {} if tried is None else tried
    fused = []
    for name, module in block.named_modules():
        width, candidates = _candidates(module)
        embeds = _embeds_positions(module)
        if not candidates and not embeds:
            continue
        alike = looks(module)
        if alike not in tried:
            if embeds:
                tried[alike] = 0 if _rotates_as_we_do(module) else None
            else:
                tried[alike] = _fitting(module, width, candidates)
        number = tried[alike]
        if number is None:
            continue
        if embeds:
            _rotate(module)
        else:
            module.forward = candidates[number]
        fused.append(name)
    return fused


def _fitting(module: nn.Module, width: int, candidates: list[Forward]) -> int | None:
    x_BTI = _trial(width, next(module.parameters()))
    wanted_BTI = module(x_BTI)
    numbers = (n for n, forward in enumerate(candidates) if _agree(forward(x_BTI), wanted_BTI))
    return next(numbers, None)


def _candidates(module: nn.Module) -> tuple[int, list[Forward]]:
    """A module's width, and what its forward might be."""
    if may_be_norm(module):
        return len(module.get_parameter("weight")), list(_norms(module))
    children = module.named_children()
    linears = {name: child for name, child in children if isinstance(child, nn.Linear)}
    if len(linears) != 3:
        return 0, []
    return next(iter(linears.values())).in_features, list(_gated(module, linears))


def _norms(norm: nn.Module) -> Iterator[Forward]:
    if getattr(norm, "bias", None) is not None:
        return
    weight_I = norm.get_parameter("weight")
    epsilons = {value for value in vars(norm).values() if isinstance(value, float)}
    for eps in sorted(epsilons):
        for form in _FORMS:
            yield partial(rms_norm, weight_I=weight_I, eps=eps, form=form)


def _gated(module: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[Forward]:
    one, other, last = linears
    first, second, down = linears.values()
    if first.weight.shape == second.weight.shape and down.in_features == first.out_features:
        yield partial(_gated_forward, module, one, other, last)
        yield partial(_gated_forward, module, other, one, last)


def _gated_forward(module: nn.Module, gate: str, up: str, down: str, x: Tensor) -> Tensor:
    """By name, since other linears may be put in their places: quantized ones, or joined."""
    inner = silu_product(getattr(module, gate)(x), getattr(module, up)(x))
    y: Tensor = getattr(module, down)(inner)
    return y


def _embeds_positions(module: nn.Module) -> bool:
    """Whether a module's forward calls a function of the name and the arguments that we know."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(_ROTARY)
    return callable(own) and list(inspect.signature(own).parameters)[:4] == ["q", "k", "cos", "sin"]


def _rotates_as_we_do(module: nn.Module) -> bool:
    """Whether `rotated` can stand for that function."""
    own = type(module).forward.__globals__[_ROTARY]
    heads, tokens, values = _ROTARY_TRIAL
    like = next(module.parameters())
    q_BHTD, k_BHTD, tables_BHTD = (
        _trial(values, like, rows=count * tokens).view(1, count, tokens, values)
        for count in (heads, 1, 2)
    )
    cos_BTD, sin_BTD = tables_BHTD.unbind(1)
    wanted = own(q_BHTD, k_BHTD, cos_BTD, sin_BTD)
    found = [rotated(x_BHTD, cos_BTD, sin_BTD) for x_BHTD in (q_BHTD, k_BHTD)]
    return all(map(_agree, found, wanted))


def _rotate(module: nn.Module) -> None:
    """Let this module's forward find our function under the name that it calls; no other's does."""
    forward = type(module).forward
    own = forward.__globals__[_ROTARY]

    def embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        plain = not more and not named and cos.ndim == 3 and cos.dtype == q.dtype == k.dtype
        if not plain or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return own(q, k, cos, sin, *more, **named)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    ours = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: embed},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(ours, module)


def _trial(width: int, like: Tensor, rows: int = len(_TRIED_SCALES)) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(rows)
    scales = torch.tensor(_TRIED_SCALES, device=like.device)
    scale_T1 = scales.repeat(-(-rows // len(scales)))[:rows, None]
    x_TI = torch.randn(rows, width, generator=generator, device=like.device)
    return (x_TI * scale_T1)[None].to(like.dtype)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """But for roundings, token by token: far closer than another function would come by chance."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    off_BT = (found.float() - wanted.float()).norm(dim=-1)
    return bool((off_BT <= 2 * torch.finfo(wanted.dtype).eps * wanted.float().norm(dim=-1)).all())
