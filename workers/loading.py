"""Finished models as transformers modules, from their folders."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantcore.errors import SourceError
from quantcore.formats import QuantizedLinear, gptq, native
from quantcore.linear import ServedLinear
from quantcore.schemes import Scheme
from workers.skeleton import empty_model, quiet_transformers

# the scheme of each quantized linear, and what reads one from its tensors and its in_features
_Linears = tuple[
    Mapping[str, Scheme], Callable[[Mapping[str, Tensor], Scheme, int], QuantizedLinear]
]


def load(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A fetched artifact in any format, or an unquantized model: ready to compute in `dtype`.

    The formats that transformers loads without another library are left to it; here are the others.
    Raises SourceError for one of these that is damaged, or of another version.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        config = json.loads((folder / "config.json").read_text())
        quantization = config.get("quantization_config") or {}
        method = quantization.get("quant_method")
        if method not in _READERS:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        plain = AutoConfig.from_pretrained(folder)
        del plain.quantization_config
    try:
        model = empty_model(plain, dtype)
        tensors = _tensors(folder)
        schemes, read = _READERS[method](quantization, tensors)
        for name, scheme in schemes.items():
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): tensors.pop(key) for key in _of(tensors, prefix)}
            bias = parts.pop("bias", None)
            width = model.get_submodule(name).in_features
            linear = read(parts, scheme, width)
            served = ServedLinear(linear, None if bias is None else bias.to(dtype))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, served)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{folder} is no {method} artifact that is whole: {error!r}") from None
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise SourceError(f"{folder} lacks '{empty[0]}'")
    return model.eval().to(device)


def _native(quantization: Mapping[str, Any], _: Mapping[str, Tensor]) -> _Linears:
    return native.schemes_of(quantization), native.read


def _gptq(quantization: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Linears:
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    schemes = {name: gptq.scheme_of(name, quantization) for name in names}
    return schemes, partial(gptq.read, version=gptq.version_of(quantization))


# by config.json's quant_method, from the rest of it and all tensors
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], _Linears]] = {
    native.METHOD: _native,
    gptq.METHOD: _gptq,
}


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensors[name] = opened.get_tensor(name)
    return tensors


def _of(tensors: dict[str, Tensor], prefix: str) -> list[str]:
    return [name for name in tensors if name.startswith(prefix)]
