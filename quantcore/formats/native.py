"""The project's own format: safetensors that carry every scheme, loaded by workers/loading.py.

    NAME.weight_codes    int8 or float8 (O, I); 4 bits two to a byte, uint8 (O, ceil(I / 2))
    NAME.weight_scale    (O, G); (1,) where all rows share one
    NAME.weight_zero     (O, G) where there is one: int8; a float zero point in the scale's dtype
    NAME.input_scale     (1,), of static schemes
    NAME.input_factor    float32 (I,): inputs are divided by it first (SmoothQuant)

Engines do not know it. What it has beyond compressed-tensors is a factor on inputs that no norm
could take, float zero points, and any scheme beside any other.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.formats.base import Format, QuantizedLinear, int8_codes, scale_of_rows
from quantcore.nibbles import packed_nibbles, unpacked_nibbles
from quantcore.schemes import Scheme

METHOD = "quantfleet"  # config.json's quant_method
VERSION = 2


def encode(linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    scheme, qparams = linear.scheme, linear.qparams
    tensors = {
        "weight_codes": packed_nibbles(linear.codes_OI)
        if scheme.bits == 4
        else linear.stored_codes(),
        "weight_scale": linear.stored_scale(scale_dtype),
    }
    if scheme.zero_point == "int":
        tensors["weight_zero"] = qparams.zero_OG
    elif scheme.zero_point == "float":
        tensors["weight_zero"] = qparams.zero_OG.to(scale_dtype)
    if linear.input_scale is not None:
        tensors["input_scale"] = torch.tensor([linear.input_scale], dtype=scale_dtype)
    if linear.input_factor_I is not None:
        tensors["input_factor"] = linear.input_factor_I
    return tensors


def read(tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QuantizedLinear:
    """What `encode` was given, scales as they were stored."""
    codes_OI = tensors["weight_codes"]
    codes_OI = unpacked_nibbles(codes_OI, in_features) if scheme.bits == 4 else int8_codes(codes_OI)
    scale_OG = scale_of_rows(tensors["weight_scale"], scheme, len(codes_OI))
    if scheme.symmetric:
        zero_OG = torch.zeros(scale_OG.shape, dtype=torch.int8, device=scale_OG.device)
    else:
        zero_OG = tensors["weight_zero"]
        zero_OG = zero_OG.float() if scheme.zero_point == "float" else zero_OG
    scale = tensors.get("input_scale")
    return QuantizedLinear(
        codes_OI,
        Qparams(scale_OG, zero_OG),
        scheme,
        None if scale is None else float(scale.item()),
        tensors.get("input_factor"),
        tensors["weight_scale"].dtype,
    )


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor:
    """For inputs as they were before smoothing: the factor is in the weight."""
    linear = read(tensors, scheme, in_features)
    w_OI = dequantize(linear.codes_OI, linear.qparams, scheme)
    return w_OI if linear.input_factor_I is None else w_OI / linear.input_factor_I


def _config(schemes: Mapping[str, Scheme], skipped: Iterable[str]) -> dict[str, Any]:
    distinct = sorted(set(schemes.values()), key=Scheme.label)
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "schemes": [
            {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme)}
            for scheme in distinct
        ],
        "linears": {name: distinct.index(scheme) for name, scheme in sorted(schemes.items())},
        "skipped": sorted(skipped),
    }


def schemes_of(
    config: Mapping[str, Any], _linears: Iterable[str] = (), _stored: Iterable[str] = ()
) -> dict[str, Scheme]:
    if config["version"] != VERSION:
        raise ValueError(f"version {config['version']}")
    schemes = [Scheme(**entry) for entry in config["schemes"]]
    return {name: schemes[index] for name, index in config["linears"].items()}


def _refusal(module_kind: str, scheme: Scheme) -> str | None:
    if module_kind != "Linear":
        return f"{module_kind} layers are not handled yet: write skip: true for it"
    return None


FORMAT = Format(
    refusal=_refusal,
    shape_refusal=lambda scheme, out_features, in_features: None,
    refusal_together=lambda schemes: None,
    fused=(),
    input_factors=True,
    output_head=True,
    storable=lambda qparams, scheme, stored: qparams,
    code_bits=lambda scheme: scheme.bits,
    other_bytes=lambda scheme, out_features, in_features: 0,
    encode=encode,
    read=read,
    decode=_decode,
    config=_config,
    quant_method=METHOD,
    schemes_of=schemes_of,
)
