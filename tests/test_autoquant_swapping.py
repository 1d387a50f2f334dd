"""A plan's layouts on a model that was loaded: the same codes, laid as the plan says."""

import pytest
import torch
from torch import nn

from quantcore.autoquant import relay, restore
from quantcore.errors import QuantizationError, ResourceError
from quantcore.joining import Joined
from quantcore.quantize import quantize_
from quantcore.tensors import QuantizedTensor, relayout
from tests.plans import H200
from tests.test_autoquant_inplace import HERE, INT4_WINS, SCHEMES, MadeUp, ids, model, planned


def loaded(plan_of: nn.Module) -> nn.Module:
    """As an artifact of the same plan is: its codes, all plain."""
    one = model()
    for name, module in plan_of.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedTensor):
            weight = relayout(module.weight, "plain")
            one.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return one


def test_a_loaded_model_is_laid_as_its_plan_says_and_computes_the_same() -> None:
    swapped, joined = model(), model()
    plan = planned(swapped, candidates=SCHEMES, bench=MadeUp(**INT4_WINS)).plan
    assert plan is not None
    one = loaded(swapped)
    assert one.blocks[0].q_proj.weight.layout_name == "plain"
    relay(one, plan, hardware=HERE)
    assert one.blocks[0].q_proj.weight.layout_name == "int4_cpu"
    torch.testing.assert_close(one(ids()), swapped(ids()), rtol=0.02, atol=0.02)
    relay(one, plan, hardware=HERE)  # again changes nothing
    plan = planned(model(), candidates=SCHEMES, bench=MadeUp(**INT4_WINS), join=True).plan
    assert plan is not None
    restore(joined, plan, hardware=HERE)
    both = loaded(joined)
    relay(both, plan, hardware=HERE, join=True)
    assert isinstance(both.blocks[0].q_proj, Joined)
    assert both.blocks[0].q_proj.weight.layout_name == "int4_cpu"


def test_another_artifact_or_another_machine_is_refused_before_anything_is_laid() -> None:
    plan = planned(model(), candidates=SCHEMES, bench=MadeUp(**INT4_WINS)).plan
    assert plan is not None
    with pytest.raises(
        QuantizationError, match=r"plan: 'blocks.0.\w+' is dense, and int4 sym g32 int4_cpu in the"
    ):
        relay(model(), plan, hardware=HERE)
    other = model()
    quantize_(other, "int4", group_size=32, inductor_settings=False)
    quantize_(
        other := loaded(other),
        "int8",
        lambda name, _: name == "head",
        inductor_settings=False,
    )
    other.blocks[1].o_proj.weight = nn.Parameter(
        relayout(other.head.weight, "plain"), requires_grad=False
    )
    with pytest.raises(QuantizationError, match=r"'blocks.1.o_proj' is int8 sym channel, and int4"):
        relay(other, plan, hardware=HERE)
    assert other.blocks[0].q_proj.weight.layout_name == "plain"
    with pytest.raises(ResourceError, match="plan: made for Made up"):
        relay(other, plan, hardware=H200)
