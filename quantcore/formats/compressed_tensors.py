"""The compressed-tensors format, which vLLM, SGLang and transformers load.

Config classes and bit packing are the compressed-tensors library's own; which tensor holds what
is told in its compressors `pack_quantized` (weight-only) and `naive_quantized` (W8A8).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.formats.base import Format, QuantizedLinear
from quantcore.schemes import Scheme

_PACKED = "pack-quantized"
_PLAIN = "int-quantized"


def _storage(scheme: Scheme) -> str:
    return _PLAIN if scheme.kind.activation_bits else _PACKED


def _refusal(module_kind: str, scheme: Scheme) -> str | None:
    if module_kind != "Linear":
        return f"compressed-tensors has no {module_kind} layers: write skip: true for it"
    if scheme.kind.activation_bits and not scheme.symmetric:
        return "compressed-tensors engines run W8A8 with symmetric weights: write symmetric: true"
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
    scale_OG = qparams.scale_OG.to(scale_dtype)
    if _storage(scheme) == _PLAIN:
        plain = {"weight": linear.codes_OI, "weight_scale": scale_OG}
        if linear.input_scale is not None:
            plain["input_scale"] = torch.tensor([linear.input_scale], dtype=scale_dtype)
        return plain
    tensors = {
        "weight_packed": pack_to_int32(linear.codes_OI, scheme.bits).contiguous(),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(linear.codes_OI.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        zero_OG = pack_to_int32(qparams.zero_OG, scheme.bits, packed_dim=0)
        tensors["weight_zero_point"] = zero_OG.contiguous()
    return tensors


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, _in_features: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale_OG = tensors["weight_scale"].float()
    zero_OG = torch.zeros(scale_OG.shape, dtype=torch.int8, device=scale_OG.device)
    if _storage(scheme) == _PLAIN:
        return dequantize(tensors["weight"], Qparams(scale_OG, zero_OG), scheme)
    shape = torch.Size(tensors["weight_shape"].tolist())
    codes_OI = unpack_from_int32(tensors["weight_packed"], scheme.bits, shape)
    if not scheme.symmetric:
        # The library (0.20) cannot unpack along dim 0 what fills a single row of words, as the
        # zero points of 8 rows do: its transpose keeps strides that it cannot view as bytes.
        packed_GO = tensors["weight_zero_point"].t().clone(memory_format=torch.contiguous_format)
        zero_OG = unpack_from_int32(packed_GO, scheme.bits, scale_OG.t().shape).t()
    return dequantize(codes_OI, Qparams(scale_OG, zero_OG), scheme)


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
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    activations = None
    if scheme.kind.activation_bits:
        activations = QuantizationArgs(
            num_bits=scheme.kind.activation_bits,
            symmetric=True,
            strategy="tensor" if scheme.kind.static else "token",
            dynamic=not scheme.kind.static,
        )
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=activations, format=_storage(scheme)
    )


FORMAT = Format(
    refusal=_refusal,
    refusal_together=_refusal_together,
    fused=(
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"gate_proj", "up_proj"}),
    ),
    input_factors=False,
    encode=_encode,
    decode=_decode,
    config=_config,
)
