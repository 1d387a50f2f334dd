"""A state dict with quantized tensors as plain tensors and JSON, for safetensors: nothing pickled.

    tensors, facts = flatten_state(model.state_dict())
    safetensors.torch.save_file(tensors, "model.safetensors", metadata={"quantized": facts})

    model.load_state_dict(unflatten_state(tensors, facts), assign=True)

`proj.weight` becomes proj.weight.codes, proj.weight.scale and so on. Layouts whose bytes hang on
the CPU that packed them are stored plain and packed again.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import QuantizationError
from quantcore.schemes import Scheme
from quantcore.tensors.layouts import LAYOUTS, Layout
from quantcore.tensors.packing import relayout
from quantcore.tensors.tensor import INNER, Facts, QuantizedTensor

_VERSION = 1


def flatten_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Plain tensors by name, and JSON that tells which of them make up which quantized tensor."""
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, QuantizedTensor):
            tensors[name] = tensor
            continue
        layout = tensor.facts.layout
        stored = tensor if LAYOUTS[layout].portable else relayout(tensor, Layout.PLAIN)
        quantized[name] = {
            "scheme": {f.name: getattr(tensor.scheme, f.name) for f in dataclasses.fields(Scheme)},
            "layout": layout.value,
            "features": list(tensor.facts.features),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "transposed": tensor.facts.transposed,
        }
        for inner, part in stored.parts().items():
            tensors[f"{name}.{inner}"] = part.contiguous()
    return tensors, json.dumps({"version": _VERSION, "quantized": quantized}, sort_keys=True)


def unflatten_state(tensors: Mapping[str, Tensor], facts: str) -> dict[str, Tensor]:
    """What `flatten_state` was given. Raises QuantizationError where a part is missing or odd."""
    state = dict(tensors)
    try:
        told = json.loads(facts)
        if told["version"] != _VERSION:
            raise QuantizationError(f"a state of version {told['version']}: this reads {_VERSION}")
        for name, about in told["quantized"].items():
            layout = Layout(about["layout"])
            known = Facts(
                scheme=Scheme(**about["scheme"]),
                layout=layout if LAYOUTS[layout].portable else Layout.PLAIN,
                features=(about["features"][0], about["features"][1]),
                dtype=getattr(torch, about["dtype"]),
                transposed=about["transposed"],
            )
            parts = {n: state.pop(f"{name}.{n}") for n in INNER if f"{name}.{n}" in state}
            if odd := [other for other in state if other.startswith(f"{name}.")]:
                raise QuantizationError(f"{odd[0]} is in no layout: flatten the state anew")
            weight = relayout(QuantizedTensor(parts, known), layout)
            state[name] = nn.Parameter(weight, requires_grad=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantizationError(f"no state of quantized tensors that is whole: {error!r}") from None
    return state
