"""Quantized tensors as plain tensors and JSON, through a safetensors file and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quantcore.errors import QuantizationError
from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor, flatten_state, unflatten_state
from tests.quantized import FORMS, laid, layouts_of, linear, tokens


def module(weight: QuantizedTensor) -> nn.Sequential:
    made = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    made[1].weight = nn.Parameter(weight, requires_grad=False)
    return made


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_a_state_dict_goes_through_safetensors(scheme: Scheme, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layout in layouts_of(scheme, dtype):
            ours = linear(scheme, 32, 64, factor=True, sparse=layout == Layout.SPARSE_24)
            before = module(laid(ours, dtype, layout))
            tensors, facts = flatten_state(before.state_dict())
            assert not any(isinstance(tensor, QuantizedTensor) for tensor in tensors.values())
            file = tmp_path / f"{layout}.safetensors"
            save_file(tensors, file, metadata={"quantized": facts})
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata()["quantized"]
            state = unflatten_state(load_file(file), told)
            with torch.device("meta"):
                after = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
            after.load_state_dict(state, assign=True)
            weight = after[1].weight
            assert isinstance(weight, QuantizedTensor)
            assert weight.facts == before[1].weight.facts
            x_TI = tokens(3, 64, dtype=dtype)
            with torch.no_grad():
                linear_before, linear_after = before[1].to(dtype), after[1].to(dtype)
                assert torch.equal(linear_after(x_TI), linear_before(x_TI))


def test_a_quantized_model_takes_a_state_in_place() -> None:
    scheme = Scheme(name="int8_dynamic")
    one = module(QuantizedTensor.of(linear(scheme, 32, 64), torch.float32))
    other = module(torch.empty_like(one[1].weight))  # type: ignore[arg-type]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other[1].weight.dequantize(), one[1].weight.dequantize())  # type: ignore[operator]


def test_a_state_that_is_damaged_is_refused() -> None:
    ours = linear(Scheme(name="int4", group_size=32), 32, 64)
    tensors, facts = flatten_state({"w": QuantizedTensor.of(ours, torch.float32)})
    with pytest.raises(QuantizationError, match="codes"):
        unflatten_state({"w.scale": tensors["w.scale"]}, facts)
    with pytest.raises(QuantizationError, match=r"w\.sums is in no layout: flatten the state anew"):
        unflatten_state(tensors | {"w.sums": torch.zeros(32)}, facts)
    with pytest.raises(QuantizationError, match="whole"):
        unflatten_state(tensors, facts[:-4])
    told = json.loads(facts) | {"version": 9}
    with pytest.raises(QuantizationError, match="version 9"):
        unflatten_state(tensors, json.dumps(told))
