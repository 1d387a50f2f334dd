"""The compressed-tensors format, which vLLM, SGLang and transformers load.

Config classes and bit packing are the compressed-tensors library's own; which tensor holds what
is told in its compressors `pack_quantized` (integers alone) and `naive_quantized` (float8, and
integers whose activations are rounded too).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.formats.base import Format, QuantizedLinear, int8_codes, scale_of_rows
from quantcore.formats.words import pack_words
from quantcore.schemes import SCHEME_KINDS, FloatGrid, Grid, Scheme

_PACKED = "pack-quantized"
_INTEGERS = "int-quantized"
_FLOATS = "float-quantized"


def _storage(scheme: Scheme) -> str:
    if isinstance(scheme.grid, FloatGrid):
        return _FLOATS
    return _INTEGERS if scheme.activations else _PACKED


def _refusal(module_kind: str, scheme: Scheme) -> str | None:
    if module_kind != "Linear":
        return f"compressed-tensors has no {module_kind} layers: write skip: true for it"
    if scheme.zero_point == "float":
        return (
            "compressed-tensors has whole zero points alone: write zero_point: int, or "
            "output.format: native"
        )
    return None


def _refusal_together(schemes: frozenset[Scheme]) -> str | None:
    """transformers loads zero points only by dequantizing, and then under one scheme for all."""
    if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
        return (
            "transformers cannot load an asymmetric scheme beside another one: write "
            "symmetric: true, or one scheme for all layers"
        )
    return None


def _encode(linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme, qparams = linear.scheme, linear.qparams
    scale_OG = linear.stored_scale(scale_dtype)
    if _storage(scheme) != _PACKED:
        plain = {"weight": linear.stored_codes(), "weight_scale": scale_OG}
        if linear.input_scale is not None:
            plain["input_scale"] = torch.tensor([linear.input_scale], dtype=scale_dtype)
        return plain
    tensors = {
        "weight_packed": pack_words(linear.codes_OI, scheme.bits),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(linear.codes_OI.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        zero_OG = pack_to_int32(qparams.zero_OG, scheme.bits, packed_dim=0)
        tensors["weight_zero_point"] = zero_OG.contiguous()
    return tensors


def _read(tensors: Mapping[str, Tensor], scheme: Scheme, _in_features: int) -> QuantizedLinear:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if "weight_g_idx" in tensors:
        raise ValueError("its columns are out of order (weight_g_idx)")
    rows = len(tensors["weight" if _storage(scheme) != _PACKED else "weight_packed"])
    stored = tensors["weight_scale"].dtype
    scale_OG = scale_of_rows(tensors["weight_scale"], scheme, rows)
    zero_OG = torch.zeros(scale_OG.shape, dtype=torch.int8, device=scale_OG.device)
    if _storage(scheme) != _PACKED:
        qparams, scale = Qparams(scale_OG, zero_OG), tensors.get("input_scale")
        static = None if scale is None else float(scale.item())
        codes_OI = int8_codes(tensors["weight"])
        return QuantizedLinear(codes_OI, qparams, scheme, static, None, stored)
    shape = torch.Size(tensors["weight_shape"].tolist())
    codes_OI = unpack_from_int32(tensors["weight_packed"], scheme.bits, shape)
    if not scheme.symmetric:
        # The library (0.20) cannot unpack along dim 0 what fills a single row of words, as the
        # zero points of 8 rows do: its transpose keeps strides that it cannot view as bytes.
        packed_GO = tensors["weight_zero_point"].t().clone(memory_format=torch.contiguous_format)
        zero_OG = unpack_from_int32(packed_GO, scheme.bits, scale_OG.t().shape).t()
    return QuantizedLinear(codes_OI, Qparams(scale_OG, zero_OG), scheme, None, None, stored)


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor:
    linear = _read(tensors, scheme, in_features)
    return dequantize(linear.codes_OI, linear.qparams, scheme)


def _config(schemes: Mapping[str, Scheme], skipped: Iterable[str]) -> dict[str, Any]:
    """One config group per scheme.

    A single scheme targets the class Linear and lists what it skips, the form that every engine
    knows best. Several name their linears one by one, so that no engine has to choose between a
    class and a name.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    named: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        named.setdefault(scheme, []).append(name)
    targets = {s: ["Linear"] for s in named} if len(named) == 1 else named
    groups = {
        f"group_{index}": _library_scheme(scheme, targets[scheme])
        for index, scheme in enumerate(named)
    }
    storages = {_storage(scheme) for scheme in named}
    config: dict[str, Any] = QuantizationConfig(
        config_groups=groups,
        format=storages.pop() if len(storages) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted(skipped),
    ).model_dump(mode="json", exclude_none=True)
    if not all(scheme.symmetric for scheme in named):
        # compressed-tensors 0.20 gives the empty module an unpacked zero point, which no
        # checkpoint fits; dequantizing while loading takes another way. vLLM ignores the key.
        config["dequantize"] = True
    return config


def _library_scheme(scheme: Scheme, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type=_type(scheme.grid),
        symmetric=scheme.symmetric,
        strategy=scheme.span,
        group_size=scheme.group_size,
    )
    rounded = None
    if scheme.activations is not None:
        activations = scheme.activations
        rounded = QuantizationArgs(
            num_bits=activations.grid.bits,
            type=_type(activations.grid),
            symmetric=activations.symmetric,
            strategy="tensor" if activations.static or scheme.per_tensor else "token",
            dynamic=not activations.static,
        )
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=rounded, format=_storage(scheme)
    )


def _schemes_of(
    config: Mapping[str, Any], linears: Iterable[str], _stored: Iterable[str]
) -> dict[str, Scheme]:
    """Groups target the class Linear, names, or names by pattern; `ignore` takes some out."""
    from compressed_tensors.quantization import QuantizationScheme

    ignored = list(config.get("ignore") or ())
    names = [name for name in linears if not _targeted(name, ignored)]
    schemes: dict[str, Scheme] = {}
    for group in config["config_groups"].values():
        scheme = _own_scheme(QuantizationScheme.model_validate(group))
        schemes |= {name: scheme for name in names if _targeted(name, group["targets"])}
    return schemes


def _targeted(name: str, targets: Iterable[str]) -> bool:
    return any(
        re.match(target.removeprefix("re:"), name) is not None
        if target.startswith("re:")
        else target in (name, "Linear")
        for target in targets
    )


def _own_scheme(theirs: Any) -> Scheme:
    """The row of our table that says the same."""
    for name, kind in SCHEME_KINDS.items():
        scheme = Scheme(
            name=name,
            group_size=theirs.weights.group_size,
            zero_point="none" if theirs.weights.symmetric else "int",
            per_tensor=theirs.weights.strategy == "tensor",
        )
        known = scheme.span in kind.spans and scheme.zero_point in kind.zero_points
        if known and _says(_library_scheme(scheme, [])) == _says(theirs):
            return scheme
    raise ValueError(f"no scheme here has its weights {theirs.weights}")


def _says(scheme: Any) -> list[tuple[Any, ...] | None]:
    """What weights and activations come to, without how the scales were found."""
    fields = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
    return [
        None if part is None else tuple(getattr(part, field) for field in fields)
        for part in (scheme.weights, scheme.input_activations)
    ]


def _type(grid: Grid) -> str:
    return "float" if isinstance(grid, FloatGrid) else "int"


FORMAT = Format(
    refusal=_refusal,
    shape_refusal=lambda scheme, out_features, in_features: None,
    refusal_together=_refusal_together,
    fused=(
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"gate_proj", "up_proj"}),
    ),
    input_factors=False,
    output_head=True,
    storable=lambda qparams, scheme, stored: qparams,
    code_bits=lambda scheme: scheme.bits if _storage(scheme) == _PACKED else 8,
    other_bytes=lambda scheme, out_features, in_features: 0,
    encode=_encode,
    read=_read,
    decode=_decode,
    config=_config,
    quant_method="compressed-tensors",
    schemes_of=_schemes_of,
)
