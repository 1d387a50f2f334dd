"""The gptq format, which GPTQModel, vLLM and, with optimum, transformers load.

    NAME.qweight   int32 (I * bits / 32, O): codes along the inputs, the first input lowest
    NAME.qzeros    int32 (G, O * bits / 32): zero points along the outputs, in the same order
    NAME.scales    float16 (G, O)
    NAME.g_idx     int32 (I,): the group of each input

Codes are unsigned, w = scale * (code - zero): ours, and their zero points, moved up by
2**(bits-1), which is itself the zero point of a symmetric grid. Version 1 stores a zero point less
one; version 2 (checkpoint_format gptq_v2) as it is. Readers of version 1 add the one by fields, and
drop a carry or don't, or by words, where it runs into a neighbour: they disagree on a zero point of
0. A symmetric grid has no such, so version 1 is for these alone. GPTQModel refuses all others in
it that it did not write itself, and vLLM has no kernels for them in either version.

Scales are float16 in all such checkpoints, whatever the model computes in. They are rounded to the
model's dtype first: of a bfloat16 model, what float16 holds is then a bfloat16, and an engine that
computes in that has the same weights.

Read off GPTQModel 7.7 (nn_modules/qlinear, models/loader.py), optimum 2.3 (gptq/quantizer.py) and
vLLM 0.32 (quantization/auto_gptq.py, utils/gptq_utils.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.formats.base import Format, QuantizedLinear
from quantcore.formats.words import pack_words
from quantcore.schemes import FloatGrid, Scheme

METHOD = "gptq"  # config.json's quant_method

_LESS = {1: 1, 2: 0}  # what a zero point is stored less, by version
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel has kernels for
_SCALES = torch.float16
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-24, torch.finfo(_SCALES).max

# Engines load these as one matrix, and look it up by a name of its own
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _refusal(version: int) -> Callable[[str, Scheme], str | None]:
    name = METHOD if version == 1 else f"{METHOD}_v2"

    def refusal(module_kind: str, scheme: Scheme) -> str | None:
        if module_kind != "Linear":
            return f"{name} has no {module_kind} layers here: write skip: true for it"
        if scheme.activations is not None or isinstance(scheme.grid, FloatGrid):
            return (
                f"{name} has integer weights alone: write scheme: int4 or int8, or output.format: "
                "compressed-tensors"
            )
        if scheme.zero_point == "float":
            return (
                f"{name} has whole zero points alone: write symmetric: true, or output.format: "
                "native"
            )
        if scheme.zero_point == "int" and version == 1:
            return (
                f"{name} stores zero points less one, and engines disagree on what to add to a 0: "
                "write symmetric: true, or output.format: gptq_v2"
            )
        if scheme.group_size is not None and scheme.group_size not in _GROUPS:
            known = ", ".join(map(str, _GROUPS))
            return (
                f"engines have no {name} kernels for groups of {scheme.group_size}: write "
                f"group_size: channel, or one of {known}"
            )
        return None

    return refusal


def _shape_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Engines take shapes for packed ones times the codes in a word."""
    codes = 32 // scheme.bits
    if out_features % codes or in_features % codes:
        return (
            f"gptq packs {codes} codes into a word, of outputs as of inputs, and there are no such "
            "multiples: write skip: true for it, or output.format: compressed-tensors"
        )
    return None


def _storable(qparams: Qparams, _scheme: Scheme, stored: torch.dtype) -> Qparams:
    scale_OG = qparams.scale_OG.to(stored).float().clamp(_LEAST_SCALE, _LARGEST_SCALE)
    return Qparams(scale_OG.to(_SCALES).float(), qparams.zero_OG)


def _encode(version: int) -> Callable[[QuantizedLinear, torch.dtype], dict[str, Tensor]]:
    def encode(linear: QuantizedLinear, _scale_dtype: torch.dtype) -> dict[str, Tensor]:
        scheme, qparams = linear.scheme, linear.qparams
        middle = -scheme.grid.lowest
        zero_GO = qparams.zero_OG.t().int() + middle - _LESS[version]
        in_features = linear.codes_OI.shape[1]
        group_size = scheme.group_size or in_features
        return {
            "qweight": pack_words(linear.codes_OI, scheme.bits).t().contiguous(),
            "qzeros": _packed(zero_GO, scheme.bits),
            "scales": qparams.scale_OG.t().to(_SCALES).contiguous(),
            "g_idx": torch.arange(in_features, dtype=torch.int32) // group_size,
        }

    return encode


def read(
    tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int, *, version: int
) -> QuantizedLinear:
    """What `encode` was given, from its own tensors or another tool's without act-order."""
    group_size = scheme.group_size or in_features
    groups_I = torch.arange(in_features, device=tensors["g_idx"].device) // group_size
    if not torch.equal(tensors["g_idx"].long(), groups_I):
        raise ValueError("groups of inputs in another order (desc_act)")
    middle = -scheme.grid.lowest
    codes_OI = _unpacked(tensors["qweight"].t(), scheme.bits) - middle
    zero_GO = _unpacked(tensors["qzeros"], scheme.bits) - middle + _LESS[version]
    zero_OG = zero_GO.t().contiguous().to(torch.int8)
    qparams = Qparams(tensors["scales"].t().contiguous().float(), zero_OG)
    return QuantizedLinear(codes_OI.to(torch.int8), qparams, scheme)


def _decode(version: int) -> Callable[[Mapping[str, Tensor], Scheme, int], Tensor]:
    def decode(tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor:
        linear = read(tensors, scheme, in_features, version=version)
        return dequantize(linear.codes_OI, linear.qparams, scheme)

    return decode


def _packed(codes_RC: Tensor, bits: int) -> Tensor:
    """int32 (R, C * bits / 32) of unsigned codes, the first of a word in its lowest bits."""
    fields_RWF = codes_RC.to(torch.int64).reshape(len(codes_RC), -1, 32 // bits)
    shifts_F = torch.arange(0, 32, bits, device=codes_RC.device)
    words_RW: Tensor = (fields_RWF << shifts_F).sum(-1)
    return words_RW.to(torch.int32)


def _unpacked(words_RW: Tensor, bits: int) -> Tensor:
    shifts_F = torch.arange(0, 32, bits, dtype=torch.int32, device=words_RW.device)
    fields_RWF = (words_RW[..., None] >> shifts_F) & ((1 << bits) - 1)
    return fields_RWF.flatten(1)


def _other_bytes(scheme: Scheme, out_features: int, in_features: int) -> int:
    zeros = out_features * scheme.groups_of(in_features) * scheme.bits // 8
    return 4 * in_features + (zeros if scheme.symmetric else 0)


def _config(version: int) -> Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]:
    """The commonest scheme stands for the model; rules name what differs from it or is skipped.

    GPTQModel and vLLM read the rules (`dynamic`), transformers the list of what is quantized.
    """

    def config(schemes: Mapping[str, Scheme], skipped: Iterable[str]) -> dict[str, Any]:
        skipped = sorted(name for name in skipped if "." in name)  # the output head by its own key
        ((usual, _),) = Counter(schemes.values()).most_common(1)
        rules: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in skipped}
        for name, scheme in schemes.items():
            if scheme != usual:
                rules[f"+:{_pattern(name)}"] = _words(scheme)
        return {
            "quant_method": METHOD,
            "checkpoint_format": METHOD if version == 1 else f"{METHOD}_v2",
            **_words(usual),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            **({"dynamic": rules} if rules else {}),
            **({"modules_in_block_to_quantize": [sorted(schemes)]} if skipped else {}),
        }

    return config


def _words(scheme: Scheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def _pattern(name: str) -> str:
    """A regular expression for a linear, and for what engines fuse it into."""
    parent, _, leaf = name.rpartition(".")
    fused = next(((key, *parts) for key, parts in _FUSED.items() if leaf in parts), (leaf,))
    return rf"{re.escape(parent)}\.(?:{'|'.join(fused)})$"


def version_of(config: Mapping[str, Any]) -> int:
    """1 or 2. Raises ValueError for the layouts of other tools."""
    written = config.get("checkpoint_format", METHOD)
    if written not in (METHOD, f"{METHOD}_v2") or config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"checkpoint_format {written}, pack_dtype {config.get('pack_dtype')}")
    return 1 if written == METHOD else 2


def _schemes_of(
    config: Mapping[str, Any], _linears: Iterable[str], stored: Iterable[str]
) -> dict[str, Scheme]:
    version_of(config)
    names = (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    return {name: scheme_of(name, config) for name in names}


def scheme_of(name: str, config: Mapping[str, Any]) -> Scheme:
    """A quantized linear's, by the first rule that matches. Raises KeyError, TypeError, ..."""
    words = {key: config[key] for key in ("bits", "group_size", "sym")}
    for pattern, rule in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), name):
            words |= {key: rule[key] for key in words if key in rule}
            break
    if words["bits"] not in (4, 8):
        raise ValueError(f"{words['bits']} bits")
    return Scheme(
        name=f"int{words['bits']}",
        group_size=None if words["group_size"] == -1 else words["group_size"],
        zero_point="none" if words["sym"] else "int",
    )


def _format(version: int) -> Format:
    return Format(
        refusal=_refusal(version),
        shape_refusal=_shape_refusal,
        refusal_together=lambda schemes: None,
        fused=tuple(frozenset(parts) for parts in _FUSED.values()),
        input_factors=False,
        output_head=False,
        storable=_storable,
        code_bits=lambda scheme: scheme.bits,
        other_bytes=_other_bytes,
        encode=_encode(version),
        read=partial(read, version=version),
        decode=_decode(version),
        config=_config(version),
        quant_method=METHOD,
        schemes_of=_schemes_of,
        owns=lambda config: (config.get("checkpoint_format", METHOD) == METHOD) == (version == 1),
    )


VERSION_1 = _format(1)
VERSION_2 = _format(2)
