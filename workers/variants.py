"""Whole models in memory, to be measured: the original, a rounded one, a finished artifact."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.affine import dequantize
from quantcore.errors import StoreError
from quantcore.schemes import Scheme
from workers.layout import MODEL
from workers.loading import load
from workers.plan import GroupPlan, Plan
from workers.rounding import rounded_stack
from workers.skeleton import empty_model
from workers.sources import ModelSource
from workers.store import Store


def variant(
    name: str, source: ModelSource, store: Store, dtype: torch.dtype, plan: Plan
) -> tuple[Any, Any]:
    """'original', 'rtn' or 'quantized', and its tokenizer."""
    if name == "original":
        return original(source, dtype), source.tokenizer()
    if name == "rtn":
        return rounded(source, dtype, plan), source.tokenizer()
    return stored_artifact(store, dtype)


def original(source: ModelSource, dtype: torch.dtype) -> Any:
    """The source's own model, computing in `dtype`."""
    return _assemble(source, dtype, {})


def rounded(source: ModelSource, dtype: torch.dtype, plan: Plan) -> Any:
    """The plan's layers rounded plainly, dequantized: what its schemes give without a method.

    Activations that are to be rounded get a scale for each token, under static schemes too.
    """
    replace = {}
    served: dict[str, Scheme] = {}
    groups = [group for block in plan.blocks for group in block.groups]
    groups += [GroupPlan((plan.head,))] if plan.head else []
    stacks = (stack for group in groups for stack in group.stacks())
    rows = (row for stack in stacks for row in rounded_stack(stack, source, plan.format))
    for layer, _, linear in rows:
        weight_OI = dequantize(linear.codes_OI, linear.qparams, linear.scheme)
        replace[f"{layer.name}.weight"] = weight_OI
        served[layer.name] = linear.scheme
    model = _assemble(source, dtype, replace)
    for layer_name, scheme in served.items():
        model.get_submodule(layer_name).register_forward_pre_hook(_rounding(scheme))
    return model


def _rounding(scheme: Scheme) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """What a linear is handed, as the scheme serves it."""
    return lambda _module, args: (fake_quantize(args[0], scheme), *args[1:])


def stored_artifact(store: Store, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a job's model/ folder, downloaded to a scratch folder first."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        folder = Path(scratch)
        names = store.list(f"{MODEL}/")
        if not names:
            raise StoreError(f"{store.url} has no {MODEL}/ folder to evaluate")
        for name in names:
            local = folder / Path(name).relative_to(MODEL)
            local.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, local)
        return load(folder, dtype, inductor_settings=False), AutoTokenizer.from_pretrained(folder)


def _assemble(source: ModelSource, dtype: torch.dtype, replace: dict[str, Tensor]) -> Any:
    model = empty_model(source.config, dtype)
    kept = (name for name in source.tensors if name not in replace)
    tensors = {**dict(source.read(kept)), **replace}
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
