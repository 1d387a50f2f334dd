"""A small model quantized as is fastest, whichever that is: recorded, chosen, swapped, restored."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore.autoquant import Autoquant, autoquant, restore
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import parse, written
from quantcore.autoquant.measurements import HardwareKind
from quantcore.autoquant.options import PROFILES, Profile
from quantcore.autoquant.race import Effort
from quantcore.autoquant.timing import Bench
from quantcore.errors import QuantizationError, ResourceError
from quantcore.joining import Joined, join_linears
from quantcore.schemes import Scheme
from tests.autoquanted import (
    HERE,
    INT4_WINS,
    INT8_WINS,
    SCHEMES,
    WIDTH,
    MadeUp,
    Model,
    ids,
    labels,
    model,
    planned,
)


def test_the_next_call_records_and_the_fastest_is_swapped_in() -> None:
    one = model()
    dense = one(ids())
    auto = autoquant(one, bench=MadeUp(**INT8_WINS), hardware=HERE)
    assert auto.plan is None
    assert torch.equal(one(ids()), dense), "the recorded call is the dense model's"
    assert auto.plan is not None
    assert set(auto.plan.labels().values()) == {"int8 sym channel plain"}
    assert labels(one) == {name: "dense" if name == "head" else "int8" for name in labels(one)}
    moved = one(ids())
    assert not torch.equal(moved, dense)
    assert (moved - dense).norm() < 0.05 * dense.norm()
    assert not one._forward_hooks and auto.finalize() is auto.plan


def test_the_model_stays_dense_where_nothing_is_faster() -> None:
    one = model()
    auto = planned(one, bench=MadeUp(dense=1.0))
    assert auto.plan is not None and set(auto.plan.labels().values()) == {"dense"}
    assert set(labels(one).values()) == {"dense"}


def test_several_calls_are_recorded_till_it_is_finalized_by_hand() -> None:
    auto = planned(model(), ids(0, 3), ids(1, 5), ids(2, 3))
    assert auto.plan is not None
    assert auto.plan.profile == Profile(name="recorded", calls={6: 2, 10: 1})
    uniform = {of.label: of.totals for of in auto.plan.choice.uniforms}
    assert uniform["dense"].time_us == 8 * (2 * 6 + 10) * WIDTH * 10.0
    assert auto.plan.choice.totals.time_us == uniform["dense"].time_us / 2
    given = planned(model(), profile=PROFILES["decode_16"])
    assert given.plan is not None and given.plan.profile == PROFILES["decode_16"]
    counted = autoquant(one := model(), calls=2, bench=MadeUp(**INT8_WINS), hardware=HERE)
    one(ids())
    assert counted.plan is None
    one(ids())
    assert counted.plan is not None


def test_nothing_is_timed_twice_and_each_shape_once() -> None:
    bench = MadeUp(**INT8_WINS)
    first = planned(model(), bench=bench)
    timed = [(of.candidate, of.rows, of.tokens) for of in bench.asked]
    assert len(set(timed)) == len(timed) == 3
    again = planned(model(), bench=(second := MadeUp()), measurements=first.measurements)
    assert second.asked == []
    assert again.plan == first.plan
    other = HardwareKind(device="cpu", name="Another", torch="2.13.0", kernels="a:1")
    renewed = planned(model(), bench=second, measurements=first.measurements, hardware=other)
    assert len(second.asked) == 3 and len(renewed.ignored) == 1
    assert len(renewed.measurements.of) == 2


def test_a_saved_plan_is_restored_to_the_bit_and_refused_elsewhere() -> None:
    one, other = model(), model()
    plan = planned(one, candidates=("default", "int4")).plan
    assert plan is not None
    read = parse(written(plan))
    assert read == plan and read.measured  # another budget needs no new measurement
    assert all(len(shape) == 2 for shape in read.shapes.values()) and read.shapes
    with pytest.raises(ResourceError, match="plan: made for Made up"):
        restore(other, read)
    assert set(labels(other).values()) == {"dense"}
    restore(other, read, hardware=HERE)
    assert labels(other) == labels(one)
    assert torch.equal(other(ids(1)), one(ids(1)))
    with pytest.raises(QuantizationError, match=r"'blocks.0.\w+' is quantized already"):
        restore(other, read, other_hardware=True)
    with pytest.raises(QuantizationError, match=r"the model has no linear 'blocks\.0"):
        restore(nn.Sequential(nn.Linear(2, 2)), read, hardware=HERE)


def test_linears_of_one_input_take_one_choice_and_are_timed_as_one() -> None:
    bench = MadeUp(**INT8_WINS)
    one, apart, restored = model(), model(), model()
    auto = planned(one, bench=bench, join=True)
    assert {of.rows for of in bench.asked} == {WIDTH, 3 * WIDTH}
    assert auto.plan is not None
    names = {layer.layer: layer.linears for layer in auto.plan.choice.layers}
    assert names["blocks.0.q_proj+k_proj+v_proj"] == tuple(
        f"blocks.0.{name}_proj" for name in "qkv"
    )
    assert names["blocks.0.o_proj"] == ("blocks.0.o_proj",)
    assert isinstance(one.blocks[0].q_proj, Joined)
    planned(apart)
    join_linears(apart)
    restore(restored, auto.plan, hardware=HERE, join=True)
    assert torch.equal(one(ids()), apart(ids()))
    assert torch.equal(one(ids()), restored(ids()))


class TestWholeModel:
    """Held-out inputs: 4 bits are fastest and move the model most."""

    def planned(self, **options: Any) -> Autoquant:
        defaults = {"bench": MadeUp(**INT4_WINS), "held_out": [ids(7), {"ids": ids(8)}]}
        return planned(model(), candidates=SCHEMES, **{**defaults, **options})

    def test_what_is_predicted_and_what_is_measured_stand_in_the_plan(self) -> None:
        plan = self.planned().plan
        assert plan is not None and set(plan.labels().values()) == {"int4 sym g32 int4_cpu"}
        by_plan = {check.plan: check for check in plan.checks}
        assert list(by_plan) == ["int8 sym channel", "int4 sym g32", "chosen"]
        int4, chosen = by_plan["int4 sym g32"], by_plan["chosen"]
        assert int4.predicted is None and int4.measured > 10 * by_plan["int8 sym channel"].measured
        assert chosen.predicted == pytest.approx(int4.measured)
        assert chosen.measured == pytest.approx(int4.measured, rel=0.1)
        uniforms = {of.label: of.totals.error for of in plan.choice.uniforms}
        assert uniforms["int8 sym channel plain"] == pytest.approx(
            by_plan["int8 sym channel"].measured
        )
        assert parse(written(plan)) == plan

    def test_the_divergence_is_that_of_the_formula(self) -> None:
        dense, swapped = model(), model()
        auto = planned(swapped, candidates=SCHEMES, bench=MadeUp(**INT4_WINS), held_out=[ids(7)])
        p, q = (of(ids(7)).double().softmax(-1) for of in (dense, swapped))
        kl = (p * (p / q).log()).sum(-1).mean().item()
        assert auto.plan is not None
        assert auto.plan.checks[-1].measured == pytest.approx(kl, rel=1e-6)

    def test_a_budget_between_two_schemes_is_kept_when_measured_and_beats_both(self) -> None:
        checks = {of.plan: of.measured for of in self.planned().plan.checks}  # type: ignore[union-attr]
        budget = (checks["int8 sym channel"] + checks["int4 sym g32"]) / 2
        plan = self.planned(budgets=Budgets(error=budget)).plan
        assert plan is not None
        assert plan.checks[-1].measured <= budget
        assert set(plan.labels().values()) == {"int4 sym g32 int4_cpu", "int8 sym channel plain"}
        fitting = [of.totals.time_us for of in plan.choice.uniforms if of.fits]
        assert plan.choice.totals.time_us < min(fitting)

    def test_a_plan_that_is_measured_past_its_budget_is_chosen_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from quantcore.autoquant.divergence import HeldOut

        free = self.planned().plan
        assert free is not None
        budget = free.checks[-1].measured * 0.6
        real = HeldOut.divergence
        calls = []

        def more(held_out: HeldOut) -> float:
            """Of mixed plans, by half as much again as what it is."""
            calls.append(real(held_out))
            return calls[-1] * (1.5 if len(calls) > 2 else 1.0)

        monkeypatch.setattr(HeldOut, "divergence", more)
        plan = self.planned(budgets=Budgets(error=budget)).plan
        assert plan is not None and len(calls) > 3
        assert plan.choice.correction > 1.2
        assert plan.checks[-1].measured <= budget

    def test_a_model_without_logits_is_refused(self) -> None:
        class Odd(Model):
            def forward(self, ids: Tensor) -> Any:
                return {"words": super().forward(ids)}

        auto = autoquant(odd := Odd(), calls=None, held_out=[ids()])
        odd(ids())
        with pytest.raises(QuantizationError, match="gives a dict, which has no logits"):
            auto.finalize()


def test_static_schemes_take_their_scales_from_what_was_recorded() -> None:
    one = model()
    scheme = Scheme(name="int8_static")
    auto = planned(one, candidates=(scheme,), bench=MadeUp(dense=10, int8_static=5))
    assert auto.plan is not None
    assert set(labels(one).values()) == {"int8_static", "dense"}
    weight = one.blocks[0].q_proj.weight
    largest = model().words(ids()).abs().max()
    assert weight.input_scale.item() == pytest.approx(largest.item() * 2 / 255, rel=0.01)
    with pytest.raises(QuantizationError, match="recorder: rtn of int8_static needs ranges"):
        restore(model(), auto.plan, hardware=HERE)


def test_a_swapped_model_is_compiled_and_a_compiled_one_refused() -> None:
    one = model()
    with pytest.raises(QuantizationError, match="model: it is compiled"):
        autoquant(torch.compile(one))
    planned(one)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), one(ids()), rtol=0.05, atol=0.05)
    # the embedding's weight needs gradients, so its backward is traced
    torch.testing.assert_close(compiled(ids()), one(ids()), rtol=0.05, atol=0.05)


def test_a_model_that_is_compiled_before_its_next_call_is_recorded_in_it() -> None:
    one, eager = model(), model()
    planned(eager)
    auto = autoquant(one, bench=MadeUp(**INT8_WINS), hardware=HERE)
    compiled = torch.compile(one, backend="aot_eager")
    with torch.no_grad():
        compiled(ids())
        assert auto.plan is not None
        assert labels(one) == labels(eager)
        torch.testing.assert_close(compiled(ids()), eager(ids()), rtol=0.05, atol=0.05)


def test_one_class_or_scheme_is_named_by_itself() -> None:
    for candidates in ("int4", SCHEMES[1]):
        one = model()
        planned(one, candidates=candidates, bench=MadeUp(**INT4_WINS))
        assert labels(one)["blocks.0.q_proj"] == "int4"
    for candidates in ("default", Scheme(name="int8")):
        plan = planned(model(), candidates=candidates).plan
        assert plan is not None
        assert set(plan.labels().values()) == {"int8 sym channel plain"}


def test_it_times_for_real_without_being_told_how() -> None:
    one = model()
    auto = autoquant(one, bench=Bench("cpu", 1 << 16), effort=Effort(spread=1, seconds=0.01))
    one(ids())
    assert auto.plan is not None
    assert auto.plan.hardware.device == "cpu" and auto.plan.hardware.threads >= 1
    assert all(layer.option.time.time_us > 0 for layer in auto.plan.choice.layers)
    restore(model(), auto.plan)
