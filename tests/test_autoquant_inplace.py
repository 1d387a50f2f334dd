"""A small model quantized as is fastest, whichever that is: recorded, chosen, swapped, restored."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore.autoquant import Autoquant, autoquant, restore
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import parse, written
from quantcore.autoquant.measurements import HardwareKind, Product
from quantcore.autoquant.options import PROFILES, Profile
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.timing import Bench
from quantcore.errors import QuantizationError, ResourceError, SpecError
from quantcore.joining import Joined, join_linears
from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor

WIDTH, WORDS = 32, 40
HERE = HardwareKind(device="cpu", name="Made up", torch="2.13.0", kernels="a:1")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x)
        out: Tensor = x + self.o_proj(mixed)
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.words(ids)))
        return logits


class MadeUp(Bench):
    """Microseconds by scheme, others' 1000; and what was asked for."""

    def __init__(self, **us: float) -> None:
        super().__init__("cpu")
        self.us = us
        self.asked: list[Product] = []

    def stopwatch(self, product: Product) -> Stopwatch:
        self.asked.append(product)
        name = product.candidate.scheme.name if product.candidate.scheme else "dense"
        us = self.us.get(name, 1000.0) * product.rows * product.tokens
        return lambda repeats: [us] * repeats


SCHEMES = (Scheme(name="int8"), Scheme(name="int4", group_size=32))
INT4_WINS = {"dense": 20.0, "int8": 10.0, "int4": 5.0}
INT8_WINS = {"dense": 10.0, "int8": 5.0, "int8_dynamic": 20.0}


def model() -> Model:
    return Model().to(torch.bfloat16).eval()


def ids(seed: int = 0, tokens: int = 24) -> Tensor:
    return torch.randint(0, WORDS, (2, tokens), generator=torch.Generator().manual_seed(seed))


def planned(on: nn.Module, *calls: Tensor, **options: Any) -> Autoquant:
    options = {"bench": MadeUp(**INT8_WINS), "hardware": HERE, **options}
    auto = autoquant(on, calls=None, **options)
    with torch.no_grad():
        for call in calls or (ids(),):
            on(call)
    auto.finalize()
    return auto


def labels(on: nn.Module) -> dict[str, str]:
    return {
        name: str(module.weight.scheme.name)
        if isinstance(module.weight, QuantizedTensor)
        else "dense"
        for name, module in on.named_modules()
        if isinstance(module, nn.Linear)
    }


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


def test_a_failure_leaves_the_model_dense_and_tells_what_can_be_had() -> None:
    one = model()
    dense = one(ids())
    with pytest.raises(SpecError, match="budget of bytes: no plan has 10 or less"):
        planned(one, budgets=Budgets(num_bytes=10))
    assert torch.equal(one(ids()), dense) and not one._forward_hooks
    assert all(not module._forward_pre_hooks for module in one.modules())


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


def test_one_class_or_scheme_is_named_by_itself() -> None:
    for candidates in ("int4", SCHEMES[1]):
        one = model()
        planned(one, candidates=candidates, bench=MadeUp(**INT4_WINS))
        assert labels(one)["blocks.0.q_proj"] == "int4"


def test_it_times_for_real_without_being_told_how() -> None:
    one = model()
    auto = autoquant(one, bench=Bench("cpu", 1 << 16), effort=Effort(spread=1, seconds=0.01))
    one(ids())
    assert auto.plan is not None
    assert auto.plan.hardware.device == "cpu" and auto.plan.hardware.threads >= 1
    assert all(layer.option.time.time_us > 0 for layer in auto.plan.choice.layers)
    restore(model(), auto.plan)


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


def test_one_class_or_scheme_may_stand_for_the_list_of_it() -> None:
    for candidates in ("default", Scheme(name="int8")):
        plan = planned(model(), candidates=candidates).plan
        assert plan is not None
        assert set(plan.labels().values()) == {"int8 sym channel plain"}


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
