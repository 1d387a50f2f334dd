"""What a model consists of, and whether quantfleet can handle it: from config and headers alone.

Shape suffixes as in blocks.py.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantcore.errors import SourceError
from quantcore.norms import norm_rule
from workers.alike import looks
from workers.blocks import BlockModel, Call, linears_of, run_block
from workers.norms import NormWatch
from workers.plan import Norm
from workers.sources import ModelSource

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LinearInfo:
    name: str  # of the module, as the checkpoint has it: model.layers.0.mlp.up_proj
    out_features: int
    in_features: int
    kind: str  # the module's class: Linear, Conv1D


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """The linears of one block, those that read one input side by side."""

    groups: tuple[tuple[LinearInfo, ...], ...]  # LinearGroups, in the order of the forward
    norms: tuple[Norm | None, ...]  # the norm that such a group alone reads

    def linears(self) -> Iterator[LinearInfo]:
        for group in self.groups:
            yield from group

    def under(self, prefix: str) -> "BlockInfo":
        """With names as the checkpoint has them, from those within the block."""
        named = partial(_under, prefix)
        groups = tuple(tuple(map(named, group)) for group in self.groups)
        return BlockInfo(groups, tuple(norm and named(norm) for norm in self.norms))


@dataclass(frozen=True, slots=True)
class Attention:
    heads: int
    kept_heads: int  # whose keys and values are kept
    width: int  # of a head
    capped: bool  # scores are made, and not fused away


@dataclass(frozen=True, slots=True)
class Architecture:
    model_type: str
    blocks: tuple[BlockInfo, ...]
    head: LinearInfo | None  # the output head; None where it shares the embedding's weight
    embedding: str | None  # module name
    vocabulary: int
    hidden_size: int
    attention: Attention
    max_length: int | None  # positions the model was made for


_Named = TypeVar("_Named", LinearInfo, Norm)


def _under(prefix: str, named: _Named) -> _Named:
    return dataclasses.replace(named, name=prefix + named.name)


def inspect(source: ModelSource) -> Architecture:
    """Look at every block without reading a weight. Raises SourceError for what is refused."""
    _refuse_by_config(source.config)
    model = BlockModel(source, torch.float32)
    _check_tensors(model)
    calls = _probe_calls(model)
    blocks = []
    looked_at: dict[Any, BlockInfo] = {}
    for index, call in enumerate(calls):
        block = model.empty_block(index)
        _refuse_by_structure(block, model.prefix(index).rstrip("."))
        # blocks that look alike, and are called alike, hand their linears the same
        alike = looks(block), len(call.args), tuple(sorted(call.kwargs))
        if alike not in looked_at:
            looked_at[alike] = _block_info(block, call, source.config)
        blocks.append(looked_at[alike].under(model.prefix(index)))
    text = source.config.get_text_config()
    return Architecture(
        model_type=source.config.model_type,
        blocks=tuple(blocks),
        head=_head(model),
        embedding=_module_name(model.skeleton, model.skeleton.get_input_embeddings()),
        vocabulary=text.vocab_size,
        hidden_size=text.hidden_size,
        attention=_attention(text),
        max_length=getattr(text, "max_position_embeddings", None),
    )


def _attention(text: Any) -> Attention:
    heads = getattr(text, "num_attention_heads", None) or 1
    return Attention(
        heads=heads,
        kept_heads=getattr(text, "num_key_value_heads", None) or heads,
        width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        capped=bool(getattr(text, "attn_logit_softcapping", None)),
    )


def _refuse_by_config(config: Any) -> None:
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise SourceError(
            f"the model is quantized already ({method}): name the model it was made from"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"'{kind}' is an encoder-decoder model; decoder-only models are handled")
    if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
        raise SourceError(f"'{kind}' takes images or sound; text-only models are handled")
    text = config.get_text_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 1:
            raise SourceError(
                f"'{kind}' is a mixture of experts ({name}: {count}), which is not handled yet"
            )
    shared = getattr(text, "num_kv_shared_layers", None)
    if shared:
        raise SourceError(
            f"'{kind}' shares keys and values across {shared} layers, which is not handled yet"
        )


def _refuse_by_structure(block: nn.Module, name: str) -> None:
    for inner, parameter in block.named_parameters():
        if parameter.ndim >= 3 and "conv" not in inner:
            shape = tuple(parameter.shape)
            raise SourceError(
                f"{name}.{inner} has shape {shape}: a mixture of experts, which is not handled yet"
            )
    for inner, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            raise SourceError(
                f"{name}.{inner} is a list of {len(module)} modules inside a block "
                "(a mixture of experts?), which is not handled yet"
            )


def _check_tensors(model: BlockModel) -> None:
    """Every parameter of the skeleton must be in the checkpoint, in its shape."""
    tied = set(model.skeleton.all_tied_weights_keys)
    for name, parameter in model.skeleton.named_parameters(remove_duplicate=False):
        info = model.source.tensors.get(name)
        if info is None:
            if name in tied:
                continue
            raise SourceError(f"the checkpoint lacks '{name}', which its config promises")
        if info.shape != tuple(parameter.shape):
            raise SourceError(
                f"'{name}' has shape {info.shape} in the checkpoint, "
                f"but {tuple(parameter.shape)} by its config"
            )


def _probe_calls(model: BlockModel) -> list[Call]:
    """How the model calls its blocks, on a few tokens, with weights that take no memory."""
    zeros = {
        name: torch.zeros(1, dtype=torch.float32).expand(tuple(p.shape))
        for name, p in model.skeleton.named_parameters()
        if p.is_meta
    }
    ids_BL = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    return model.probe(ids_BL, zeros).calls


def _block_info(block: nn.Module, call: Call, config: Any) -> BlockInfo:
    """Run the block on the meta device and see which linears are handed the same tensor.

    Names are those within the block.
    """
    seen: list[tuple[Tensor, list[LinearInfo]]] = []  # holds the inputs, so ids stay unique

    def note(name: str, module: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            weight = module.weight
            rows, width = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
            info = LinearInfo(name, rows, width, type(module).__name__)
            for tensor, group in seen:
                if tensor is args[0]:
                    group.append(info)
                    return
            seen.append((args[0], [info]))

        return hook

    linears = [*linears_of(block), *_conv1ds(block)]
    handles = [m.register_forward_pre_hook(note(name, m)) for name, m in linears]
    watch = NormWatch(block, [module for _, module in linears])
    try:
        hidden_BLH = torch.empty(
            1, _PROBE_TOKENS, config.get_text_config().hidden_size, device="meta"
        )
        call = tree_map(_to_meta, call)
        with watch.watching():
            run_block(block.to("meta"), call, hidden_BLH)
    finally:
        for handle in handles:
            handle.remove()
    return BlockInfo(
        tuple(tuple(group) for _, group in seen),
        tuple(_norm(block, watch.norm_of(tensor)) for tensor, _ in seen),
    )


def _norm(block: nn.Module, name: str | None) -> Norm | None:
    if name is None:
        return None
    module = block.get_submodule(name)
    rule = norm_rule(module)
    biased = getattr(module, "bias", None) is not None
    return Norm(name, rule, biased) if rule else None


def _conv1ds(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules():
        if isinstance(module, Conv1D):
            yield name, module


def _to_meta(value: Any) -> Any:
    if isinstance(value, Call):
        return Call(tree_map(_to_meta, value.args), tree_map(_to_meta, value.kwargs))
    return value.to("meta") if isinstance(value, Tensor) else value


def _head(model: BlockModel) -> LinearInfo | None:
    head = model.skeleton.get_output_embeddings()
    name = _module_name(model.skeleton, head)
    if name is None or f"{name}.weight" not in model.source.tensors:
        return None
    if head.weight is model.skeleton.get_input_embeddings().weight:
        return None
    rows, width = head.weight.shape
    return LinearInfo(name, rows, width, type(head).__name__)


def _module_name(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)
