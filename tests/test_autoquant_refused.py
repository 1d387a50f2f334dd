"""What autoquant refuses of models, calls and words, and what odd calls leave behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore.autoquant import autoquant, restore
from quantcore.autoquant.choice import Budgets
from quantcore.errors import QuantizationError, SpecError
from tests.autoquanted import (
    HERE,
    INT4_WINS,
    INT8_WINS,
    WIDTH,
    Block,
    MadeUp,
    Model,
    ids,
    labels,
    model,
    planned,
)


def test_linears_that_are_joined_by_name_but_read_different_inputs_are_refused() -> None:
    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x + 1))
            return out

    auto = autoquant(odd := Odd(), calls=None, join=True)
    odd(torch.randn(3, WIDTH))
    with pytest.raises(QuantizationError, match="'v_proj' was handed another input than 'q_proj'"):
        auto.finalize()
    with pytest.raises(QuantizationError, match="it has failed already"):
        auto.finalize()


def test_a_failure_leaves_the_model_dense_and_tells_what_can_be_had() -> None:
    one = model()
    dense = one(ids())
    with pytest.raises(SpecError, match="budget of bytes: no plan has 10 or less"):
        planned(one, budgets=Budgets(num_bytes=10))
    assert torch.equal(one(ids()), dense) and not one._forward_hooks
    assert all(not module._forward_pre_hooks for module in one.modules())


def test_what_was_changed_between_recording_and_finalizing_is_refused() -> None:
    one = model()
    first, second = (
        autoquant(one, "int4", calls=None, bench=MadeUp(**INT4_WINS), hardware=HERE)
        for _ in range(2)
    )
    one(ids())
    first.finalize()
    with pytest.raises(QuantizationError, match=r"'blocks\.0\.q_proj' is another than"):
        second.finalize()
    other = model()
    auto = autoquant(other, "int4", calls=None, bench=MadeUp(**INT4_WINS), hardware=HERE)
    other(ids())
    other.blocks[1].o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(QuantizationError, match=r"'blocks\.1\.o_proj' is another"):
        auto.finalize()
    assert set(labels(other).values()) == {"dense"}


def test_a_plan_for_other_shapes_is_refused() -> None:
    plan = planned(model()).plan
    other = model()
    other.blocks[1].o_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
    message = "'blocks.1.o_proj' has 32 outputs and 32 inputs in the plan, and 64 and 32 in the"
    with pytest.raises(QuantizationError, match=message):
        restore(other, plan, hardware=HERE)  # type: ignore[arg-type]
    assert set(labels(other).values()) == {"dense"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ()}, "candidates: none: write 'default'"),
        ({"candidates": ("int3",)}, "candidates: unknown class 'int3'"),
        ({"candidates": ("default", None)}, "candidates: None is neither a class nor a scheme"),
        ({"calls": 0}, "calls: 0: write 1 or more"),
        ({"filter": lambda *_: False}, "filter: no linear is left"),
    ],
)
def test_odd_words_are_refused_before_anything_is_recorded(
    options: dict[str, Any], message: str
) -> None:
    one = model()
    with pytest.raises((QuantizationError, SpecError), match=message):
        autoquant(one, **options)
    assert not one._forward_hooks


def test_what_a_call_in_inference_mode_leaves_is_an_ordinary_model() -> None:
    for options in ({}, {"run": "recorded", "join": True}):
        one = model()
        auto = autoquant(one, bench=MadeUp(**INT8_WINS), hardware=HERE, **options)
        with torch.inference_mode():
            one(ids())
        assert auto.plan is not None
        assert not any(of.is_inference() for of in one.parameters())
        moved = one.to("cpu")(ids(1)).detach()
        with torch.inference_mode():
            assert torch.equal(one(ids(1)), moved)


class Routed(nn.Module):
    """Its experts are called with the tokens of theirs, which may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = torch.empty_like(x)
        for expert, mine in zip(self.experts, (first, ~first), strict=True):
            out[mine] = expert(x[mine])
        return out


def test_calls_without_tokens_take_no_time_and_count_for_none() -> None:
    one = Routed().to(torch.bfloat16)
    x = torch.randn(4, WIDTH, dtype=torch.bfloat16).abs()
    plan = planned(one, x, torch.cat([x, -x])).plan
    assert plan is not None
    assert set(plan.labels()) == {"experts.0", "experts.1"}
    with pytest.raises(QuantizationError, match=r"'experts.1' was not called"):
        planned(Routed().to(torch.bfloat16), x)


def test_a_linear_that_was_not_called_is_named() -> None:
    class Unused(Model):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(WIDTH, WIDTH)

    auto = autoquant(one := Unused(), calls=None)
    one(ids())
    with pytest.raises(QuantizationError, match="'spare' was not called"):
        auto.finalize()
