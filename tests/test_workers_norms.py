"""Norms that SmoothQuant may change, found by looking at a block, and tried by changing them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore.norms import norm_rule
from quantcore.smoothing import fold
from tests.conftest import HIDDEN
from workers.architecture import inspect
from workers.blocks import BlockModel, run_block
from workers.norms import NormWatch
from workers.sources import open_source

# by architecture: for each LinearGroup its first linear, the norm before it, and that norm's rule
EXPECTED = {
    "llama": [
        ("q_proj", "input_layernorm", "scale"),
        ("o_proj", None, None),
        ("gate_proj", "post_attention_layernorm", "scale"),
        ("down_proj", None, None),
    ],
    "gemma2": [
        ("q_proj", "input_layernorm", "offset"),
        ("o_proj", None, None),
        ("gate_proj", "pre_feedforward_layernorm", "offset"),
        ("down_proj", None, None),
    ],
    # its norms come after attention and after the mlp, so that none is before a linear
    "olmo2": [(first, None, None) for first in ("q_proj", "o_proj", "gate_proj", "down_proj")],
    # attention and mlp side by side, behind one norm
    "cohere": [
        ("q_proj", "input_layernorm", "scale"),
        ("o_proj", None, None),
        ("down_proj", None, None),
    ],
    # LayerNorms with a bias
    "stablelm": [
        ("q_proj", "input_layernorm", "scale"),
        ("o_proj", None, None),
        ("gate_proj", "post_attention_layernorm", "scale"),
        ("down_proj", None, None),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_norms_of_architectures(model_folder: Callable[..., Path], name: str) -> None:
    architecture = inspect(open_source(model_folder(name), torch.float32))
    for index, block in enumerate(architecture.blocks):
        found = [
            (group[0].name.rpartition(".")[2], norm and norm.name, norm and norm.rule)
            for group, norm in zip(block.groups, block.norms, strict=True)
        ]
        prefix = f"model.layers.{index}."
        assert found == [
            (first, norm and prefix + norm, rule) for first, norm, rule in EXPECTED[name]
        ]
        biases = {norm.bias for norm in block.norms if norm}
        assert biases == ({True} if name == "stablelm" else {False} if any(block.norms) else set())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "stablelm"])
def test_a_block_computes_the_same_after_its_norms_are_changed(
    model_folder: Callable[..., Path], name: str
) -> None:
    source = open_source(model_folder(name), torch.float32)
    architecture = inspect(source)
    model = BlockModel(source, torch.float64)
    ids_BL = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = model.embed(ids_BL)
    block = model.block(1)
    before = run_block(block, inputs.calls[1], inputs.hidden_BLH)
    changed = copy.deepcopy(block)
    parameters = dict(changed.named_parameters())
    generator = torch.Generator().manual_seed(2)
    info = architecture.blocks[1]
    for group, norm in zip(info.groups, info.norms, strict=True):
        if norm is None:
            continue
        short = norm.name.removeprefix(model.prefix(1))
        weight_I, bias_I = parameters[f"{short}.weight"], parameters.get(f"{short}.bias")
        factor_I = (0.1 + torch.rand(HIDDEN, generator=generator)).double()
        folded = fold(weight_I, bias_I, factor_I, norm.rule)
        weight_I.copy_(folded.weight_I)
        if bias_I is not None and folded.bias_I is not None:
            bias_I.copy_(folded.bias_I)
        for linear in group:
            parameters[f"{linear.name.removeprefix(model.prefix(1))}.weight"] *= folded.factor_I
    after = run_block(changed, inputs.calls[1], inputs.hidden_BLH)
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-6)  # factors are float32


class _Block(nn.Module):
    """A norm before a linear; `use` makes of its output what else reads it."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self._use = use

    def forward(self, x_TI: Tensor) -> Tensor:
        normed = self.norm(x_TI)
        output: Tensor = self.linear(normed) + self._use(normed)
        return output


@pytest.mark.parametrize(
    ("use", "alone"),
    [
        (lambda normed: torch.zeros(normed.shape, device="meta"), True),
        (lambda normed: normed, False),
        (lambda normed: normed.view(-1, HIDDEN), False),
        (nn.functional.silu, False),
    ],
    ids=["nobody", "the residual", "a view", "a function"],
)
def test_a_norm_that_others_read_too(use: Callable[[Tensor], Tensor], alone: bool) -> None:
    block = _Block(use).to("meta")
    handed: list[Tensor] = []
    block.linear.register_forward_pre_hook(lambda _module, args: handed.append(args[0]))
    watch = NormWatch(block, [block.linear])
    with watch.watching():
        block(torch.empty(5, HIDDEN, device="meta"))
    assert watch.norm_of(handed[0]) == ("norm" if alone else None)


class _Odd(nn.Module):
    """A norm whose weight is squared: neither rule divides its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x_TI: Tensor) -> Any:
        return nn.functional.rms_norm(x_TI, (HIDDEN,)) * self.weight.square()


def test_a_norm_that_uses_its_weight_in_another_way_is_left_alone() -> None:
    assert norm_rule(_Odd()) is None
    assert norm_rule(nn.RMSNorm(HIDDEN)) == "scale"
