"""Finished models as transformers modules, from their folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantcore.errors import QuantizationError, SourceError
from quantcore.formats import FORMATS, Format
from quantcore.inductor import recommended_inductor_settings
from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor, relayout
from workers.skeleton import empty_model, quiet_transformers


def load(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layout: Layout | str | Mapping[str, Layout | str] = Layout.PLAIN,
    *,
    inductor_settings: bool = True,
) -> Any:
    """A fetched artifact in any format, or an unquantized model: ready to compute in `dtype`.

    Quantized linears are nn.Linear with quantized tensors as weights, as small as they are stored,
    in `layout`, which may differ by scheme: {"int4": "int4_cpu"} leaves the others plain.
    `inductor_settings=False` leaves torch.compile's settings alone
    (quantcore/inductor.py).

    Raises SourceError for an artifact that is damaged, or that no format here can read, and
    QuantizationError for a layout that cannot hold a weight, which is named.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        config = json.loads((folder / "config.json").read_text())
        quantization = config.get("quantization_config")
        if quantization is None:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        plain = AutoConfig.from_pretrained(folder)
        del plain.quantization_config
        model = empty_model(plain, dtype)
    form = _format_of(folder, quantization)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        tensors = _tensors(folder)
        schemes = form.schemes_of(quantization, linears, tensors)
        weights = {
            name: _weight(form, _taken(tensors, f"{name}."), scheme, linears[name], dtype)
            for name, scheme in schemes.items()
        }
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{folder} is no {form.quant_method} artifact that is whole: {error!r}"
        ) from None
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    for name, weight in weights.items():
        kind = layout if isinstance(layout, str) else layout.get(schemes[name].name, Layout.PLAIN)
        try:
            moved: Any = weight.to(device)
            laid = relayout(moved, kind)
        except QuantizationError as error:
            raise QuantizationError(f"'{name}': {error}") from None
        linears[name].weight = nn.Parameter(laid, requires_grad=False)
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise SourceError(f"{folder} lacks '{empty[0]}'")
    if inductor_settings:
        recommended_inductor_settings()
    return model.eval().to(device)


def _format_of(folder: Path, quantization: Mapping[str, Any]) -> Format:
    method = quantization.get("quant_method")
    for form in FORMATS.values():
        if form.quant_method == method and form.owns(quantization):
            return form
    known = ", ".join(dict.fromkeys(form.quant_method for form in FORMATS.values()))
    raise SourceError(f"{folder} is quantized by '{method}', and what can be read is {known}")


def _weight(
    form: Format, parts: dict[str, Tensor], scheme: Scheme, linear: nn.Linear, dtype: torch.dtype
) -> QuantizedTensor:
    """The bias, if there is one, goes to the linear itself."""
    if (bias_O := parts.pop("bias", None)) is not None:
        linear.bias = nn.Parameter(bias_O.to(dtype), requires_grad=False)
    read = form.read(parts, scheme, linear.in_features)
    if read.codes_OI.shape != linear.weight.shape:
        raise ValueError(f"{tuple(read.codes_OI.shape)} codes for {tuple(linear.weight.shape)}")
    return QuantizedTensor.of(read, dtype)


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensors[name] = opened.get_tensor(name)
    return tensors


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
