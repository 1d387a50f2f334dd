import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcore.activations import fake_quantize, static_scale
from quantcore.ranges import Ranges, range_tree
from quantcore.schemes import Scheme
from quantcore.smoothing import (
    NormRule,
    Reader,
    factors,
    fold,
    input_scale,
    relative_error,
    search,
)
from quantcore.tree import total

WIDTH = 24
DYNAMIC = Scheme(name="int8_dynamic", group_size=None, zero_point="none")
STATIC = Scheme(name="int8_static", group_size=None, zero_point="none")
INT4 = Scheme(name="int4", group_size=None, zero_point="none")
CPU = torch.device("cpu")
RULES: tuple[NormRule, ...] = ("scale", "offset")


def inputs(tokens: int, seed: int = 0) -> Tensor:
    """Tokens with two channels far above the rest, as a language model's are."""
    x_TI = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    x_TI[:, 3] *= 60
    x_TI[:, 17] *= 25
    return x_TI


def ranges_of(*batches: Tensor, rows: int = 8) -> Ranges:
    tree = range_tree(1, WIDTH, rows, CPU)
    for x_TI in batches:
        tree.add(0, x_TI)
    return tree.nodes[0, 1]


def reader(scheme: Scheme, rows: int = 10, dtype: torch.dtype = torch.float32) -> Reader:
    generator = torch.Generator().manual_seed(rows)
    return Reader(torch.randn(rows, WIDTH, generator=generator).to(dtype), scheme)


class TestRanges:
    def test_extremes_and_sample(self) -> None:
        first, second = inputs(20, 1), inputs(12, 2)
        ranges = ranges_of(first, second, rows=4)
        both = torch.cat([first, second])
        assert torch.equal(ranges.largest(), both.abs().amax(0))
        assert (ranges.tokens, ranges.dropped) == (32, 0)
        places = [0, 5, 10, 15, 20, 23, 26, 29]
        assert torch.equal(ranges.sample_SI, both[places])

    def test_a_token_that_is_not_finite_is_left_out(self) -> None:
        x_TI = inputs(10)
        x_TI[4, 2] = torch.inf
        x_TI[5, 1] = torch.nan
        ranges = ranges_of(x_TI, rows=100)
        whole = ranges_of(x_TI[[0, 1, 2, 3, 6, 7, 8, 9]], rows=100)
        assert (ranges.tokens, ranges.dropped) == (8, 2)
        assert torch.equal(ranges.largest(), whole.largest())
        assert torch.equal(ranges.sample_SI, whole.sample_SI)

    def test_nothing_but_broken_tokens(self) -> None:
        ranges = ranges_of(torch.full((3, WIDTH), torch.nan))
        assert (ranges.tokens, ranges.dropped, len(ranges.sample_SI)) == (0, 3, 0)
        assert not ranges.largest().any()

    @settings(deadline=None)
    @given(st.integers(1, 16), st.data())
    def test_any_split_among_workers_gives_the_same_bits(
        self, chunks: int, data: st.DataObject
    ) -> None:
        cuts = data.draw(st.lists(st.integers(0, chunks), max_size=3).map(sorted))
        nodes = {}
        for first, last in itertools.pairwise([0, *cuts, chunks]):
            tree = range_tree(chunks, WIDTH, 2, CPU)
            for chunk in range(first, last):
                for part in range(1 + chunk % 2):
                    tree.add(chunk, inputs(5, 10 * chunk + part))
            tree.close()
            nodes.update(tree.nodes)
        merged = total(nodes, chunks)
        alone = range_tree(chunks, WIDTH, 2, CPU)
        for chunk in range(chunks):
            for part in range(1 + chunk % 2):
                alone.add(chunk, inputs(5, 10 * chunk + part))
        alone.close()
        expected = total(alone.nodes, chunks)
        for name in ("low_I", "high_I", "sample_SI"):
            assert torch.equal(getattr(merged, name), getattr(expected, name))
        assert merged.tokens == expected.tokens


class TestActivations:
    def test_each_token_is_rounded_by_its_own_extreme(self) -> None:
        x_TI = inputs(9)
        x_TI[4] = 0
        served = fake_quantize(x_TI, DYNAMIC)
        step_T1 = x_TI.double().abs().amax(1, keepdim=True) * 2 / 255
        # the one code that the positive end lacks costs the extreme up to a step
        assert ((served - x_TI).abs() <= step_T1 * 1.0001).all()
        inner = x_TI.abs() < 0.99 * x_TI.abs().amax(1, keepdim=True)
        assert ((served - x_TI).abs() <= step_T1 * 0.5001)[inner].all()
        assert not served[4].any()

    def test_a_static_scale_serves_all_tokens(self) -> None:
        x_TI = inputs(9)
        scale = static_scale(x_TI.abs().amax(0), STATIC, torch.float32)
        codes_TI = (x_TI.double() / scale).round().clamp(-128, 127)
        assert torch.allclose(fake_quantize(x_TI, STATIC, scale).double(), codes_TI * scale)

    def test_a_static_scale_is_one_that_its_dtype_stores(self) -> None:
        scale = static_scale(torch.tensor([3.14159]), STATIC, torch.bfloat16)
        assert scale == torch.tensor(scale).bfloat16().item() != 3.14159 * 2 / 255

    def test_inputs_that_never_fire_have_a_usable_scale(self) -> None:
        assert static_scale(torch.zeros(3), STATIC, torch.float32) == 1.0

    def test_weight_only_schemes_leave_activations_alone(self) -> None:
        x_TI = inputs(3)
        assert fake_quantize(x_TI, INT4) is x_TI


class TestFactors:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_the_formula(self, alpha: float) -> None:
        ranges, readers = ranges_of(inputs(50)), [reader(DYNAMIC, 5), reader(DYNAMIC, 7)]
        weight_I = torch.cat([r.w_OI for r in readers]).double().abs().amax(0)
        expected_I = ranges.largest().double() ** alpha / weight_I ** (1 - alpha)
        assert torch.allclose(factors(ranges, readers, alpha).double(), expected_I, rtol=1e-5)

    def test_silent_inputs_and_unread_ones_stay_as_they_are(self) -> None:
        x_TI, one = inputs(50), reader(DYNAMIC)
        x_TI[:, 2] = 0
        one.w_OI[:, 5] = 0
        factor_I = factors(ranges_of(x_TI), [one], 0.5)
        assert factor_I[2] == factor_I[5] == 1
        assert factor_I.isfinite().all()


class TestFold:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rule", RULES)
    def test_what_is_served_is_the_output_divided_by_the_factor(
        self, rule: NormRule, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        weight_I = torch.randn(WIDTH, generator=generator).to(dtype)
        bias_I = torch.randn(WIDTH, generator=generator).to(dtype)
        wanted_I = 10 ** (torch.rand(WIDTH, generator=generator) * 4 - 2)
        folded = fold(weight_I, bias_I, wanted_I, rule)
        assert folded.weight_I.dtype == dtype
        offset = float(rule == "offset")
        before_I = weight_I.double() + offset
        after_I = (folded.weight_I.double() + offset) * folded.factor_I.double()
        assert torch.allclose(after_I, before_I, rtol=1e-5)
        # 1 + w is stored less finely than w: factors then differ more from those wanted
        near = torch.finfo(dtype).eps * (1 + 200 * offset)
        usable = folded.factor_I != 1
        assert usable.sum() > WIDTH / 2
        assert (folded.factor_I / wanted_I - 1).abs()[usable].median() <= near
        assert folded.bias_I is not None
        assert torch.allclose(
            folded.bias_I.double() * folded.factor_I.double(),
            bias_I.double(),
            rtol=2 * torch.finfo(dtype).eps,
            atol=1e-6,
        )

    @pytest.mark.parametrize("rule", RULES)
    def test_a_channel_that_the_norm_shuts_stays_shut(self, rule: NormRule) -> None:
        weight_I = torch.full((4,), -float(rule == "offset"))
        folded = fold(weight_I, None, torch.full((4,), 3.0), rule)
        assert torch.equal(folded.weight_I, weight_I)
        assert torch.equal(folded.factor_I, torch.ones(4))

    def test_a_weight_that_would_not_be_stored_is_kept(self) -> None:
        weight_I = torch.tensor([1e-4, 1.0], dtype=torch.float16)
        folded = fold(weight_I, None, torch.tensor([1e5, 1e-5]), "scale")
        assert torch.equal(folded.weight_I, weight_I)
        assert torch.equal(folded.factor_I, torch.ones(2))


class TestSearch:
    @pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=Scheme.label)
    def test_the_error_is_that_of_the_formulas(self, scheme: Scheme) -> None:
        ranges, one = ranges_of(inputs(40)), reader(scheme)
        factor_I = factors(ranges, [one], 0.5)
        x = ranges.sample_SI.double()
        w = one.w_OI.double()
        smooth_x, smooth_w = x / factor_I, w * factor_I
        step = smooth_w.abs().amax(1, keepdim=True) * 2 / 255
        served_w = (smooth_w / step).round().clamp(-128, 127) * step
        largest = smooth_x.abs().amax(1, keepdim=True)
        if scheme is STATIC:
            largest = (ranges.largest() / factor_I).amax().double()
        served_x = (smooth_x / (largest * 2 / 255)).round().clamp(-128, 127) * (largest * 2 / 255)
        y = x @ w.T
        expected = ((y - served_x @ served_w.T) ** 2).sum() / (y**2).sum()
        assert relative_error(ranges, [one], factor_I) == pytest.approx(expected.item(), rel=0.02)

    @pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=Scheme.label)
    def test_the_least_error_is_chosen(self, scheme: Scheme) -> None:
        ranges, readers = ranges_of(inputs(40)), [reader(scheme, 6), reader(scheme, 9)]
        alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
        chosen = search(ranges, readers, alphas, lambda factor_I: factor_I)
        errors = {a: relative_error(ranges, readers, factors(ranges, readers, a)) for a in alphas}
        assert chosen.alpha == min(alphas, key=errors.__getitem__)
        assert errors[chosen.alpha] < 0.5 * relative_error(ranges, readers, torch.ones(WIDTH))

    def test_inputs_that_are_even_are_left_as_they_are(self) -> None:
        x_TI = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5)).sign()
        even = Reader(torch.randn(8, WIDTH).sign(), DYNAMIC)
        chosen = search(ranges_of(x_TI), [even], [0.5], lambda factor_I: factor_I)
        assert chosen.alpha is None
        assert torch.equal(chosen.factor_I, torch.ones(WIDTH))

    def test_what_is_measured_is_what_factors_come_to_when_stored(self) -> None:
        ranges, readers = ranges_of(inputs(40)), [reader(DYNAMIC)]
        ones_I = torch.ones(WIDTH)
        assert search(ranges, readers, [0.5], lambda factor_I: ones_I).alpha is None


def test_a_static_scale_is_of_the_smoothed_inputs() -> None:
    ranges = ranges_of(inputs(40))
    factor_I = factors(ranges, [reader(STATIC)], 0.5)
    scale = input_scale(ranges, factor_I, STATIC, torch.float32)
    assert scale == pytest.approx((ranges.largest() / factor_I).max().item() * 2 / 255)
    assert input_scale(ranges, factor_I, DYNAMIC, torch.float32) is None
