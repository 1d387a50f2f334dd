"""A decode step's attention by our kernel (quantkernels/forward), in models that run torch's SDPA.

Transformers calls attention by a name that stands in a model's config. Ours stands there for as
long as a step runs, with SDPA's own masks; what the kernel does not take goes to SDPA as it came.

As with fusing.py, no model is known by its class: it is tried. A step is run as it is, and again
under another name, by which SDPA computes and our kernel beside it, out of the same tensors. The
model stays as it is unless each of these agrees, and the step too: some models ask for names.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from quantkernels import forward
from torch import Tensor, nn

OURS = "quantfleet"
_TRIAL = "quantfleet_trial"
_REPLACED = "sdpa"

# What SDPA's function takes and does not use for one token: masks have it all
_OF_MASKS = {"cache_position", "is_causal", "position_ids", "sliding_window", "use_cache"}

Attention = Callable[..., tuple[Tensor, Any]]
Stepping = Callable[[], AbstractContextManager[None]]


@torch.no_grad()
def stepping(model: nn.Module, step: Callable[[], Tensor]) -> Stepping:
    """Within it the model's steps are ours; it changes nothing of a model that was not proven.

    `step` is one step out of a cache that it begins anew, and returns the logits.
    """
    here = next(model.parameters()).device.type
    configs = _configs(model)
    if here not in forward.FUSED_DEVICES or not configs:
        return nullcontext
    _registered()
    wanted = step()
    agreed: list[bool] = []
    _register(_TRIAL, _trial(_sdpa(), agreed))
    with _named(configs, _TRIAL):
        found = step()
    proven = bool(agreed) and all(agreed) and _agree(found, wanted)
    return partial(_named, configs, OURS) if proven else nullcontext


def _configs(model: nn.Module) -> list[Any]:
    """Those by which a model's attention is SDPA's."""
    configs = {id(config): config for m in model.modules() if (config := _config(m)) is not None}
    return list(configs.values())


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "_attn_implementation", None) == _REPLACED else None


@contextmanager
def _named(configs: list[Any], name: str) -> Iterator[None]:
    """Of each config alone: what the property sets, it sets in the configs within it as well."""
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = _REPLACED


@cache
def _registered() -> None:
    _register(OURS, _attention(_sdpa()))


def _register(name: str, attention: Attention) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[_REPLACED])


def _sdpa() -> Attention:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention: Attention = ALL_ATTENTION_FUNCTIONS[_REPLACED]
    return attention


def _attention(sdpa: Attention) -> Attention:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        if not _takes(query, key, value, attention_mask, more):
            return sdpa(module, query, key, value, attention_mask, **more)
        return _attended(query, key, value, attention_mask, more), None

    return attention


def _trial(sdpa: Attention, agreed: list[bool]) -> Attention:
    """SDPA, and beside it ours where ours would stand."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        wanted, weights = sdpa(module, query, key, value, attention_mask, **more)
        if _takes(query, key, value, attention_mask, more):
            agreed.append(_agree(_attended(query, key, value, attention_mask, more), wanted))
        return wanted, weights

    return attention


def _takes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
) -> bool:
    if query.device.type not in forward.FUSED_DEVICES or query.requires_grad or key.requires_grad:
        return False
    if more.get("dropout"):
        return False
    said = {name for name, given in more.items() if given is not None and given is not False}
    unknown = said - _OF_MASKS - {"dropout", "scaling"}
    return not unknown and forward.attends(query, key, value, mask)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
) -> Tensor:
    scale = more.get("scaling")
    return forward.attended(
        query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale
    )


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """But for roundings, vector by vector."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    off = (found.float() - wanted.float()).norm(dim=-1)
    near = max(2 * torch.finfo(wanted.dtype).eps, 1e-5)
    return bool((off <= near * wanted.float().norm(dim=-1)).all())
