import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quantcore.affine import (
    Qparams,
    choose_qparams,
    dequantize,
    quantize,
    search_qparams,
)
from quantcore.schemes import Scheme
from tests.references import Float, float8_values, round_plainly, spread

GROUP = 8
SCHEMES = [
    Scheme(name="int4", group_size=GROUP, zero_point="none"),
    Scheme(name="int4", group_size=GROUP, zero_point="int"),
    Scheme(name="int4", group_size=None, zero_point="none"),
    Scheme(name="int8", group_size=None, zero_point="int"),
    Scheme(name="int8", group_size=GROUP, zero_point="none"),
    Scheme(name="int8_dynamic", group_size=None, zero_point="none"),
]
HALF_STEP = 0.5 + 1e-4  # the quotient w / scale is itself rounded to float32
MANTISSA_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}

schemes = st.sampled_from(SCHEMES)
stored_dtypes = st.sampled_from(list(MANTISSA_BITS))
magnitudes = st.floats(2.0**-14, 2.0**14, width=32)
weights = st.builds(
    lambda values, scale: torch.from_numpy(values * np.float32(scale)),
    arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.sampled_from([GROUP, 2 * GROUP, 5 * GROUP])),
        elements=st.one_of(st.just(0.0), st.floats(-1, 1, width=16)),
    ),
    magnitudes,
)


def normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def library_args(scheme: Scheme) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )


@settings(deadline=None)
@given(weights, schemes, stored_dtypes)
def test_a_weight_comes_back_within_half_a_step(
    w_OI: Tensor, scheme: Scheme, stored: torch.dtype
) -> None:
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    scale_OI = spread(qparams.scale_OG, w_OI.shape[1])
    zero_OI = spread(qparams.zero_OG, w_OI.shape[1])
    back_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme).double().numpy()
    qmin, qmax = scheme.grid.lowest, scheme.grid.highest
    w = w_OI.double().numpy()
    clipped_OI = np.clip(w, (qmin - zero_OI) * scale_OI, (qmax - zero_OI) * scale_OI)
    assert (np.abs(back_OI - clipped_OI) <= HALF_STEP * scale_OI).all()
    # only the rounding of the scale to its stored dtype can push a weight further out
    lost_steps = (qmax - qmin) * 2.0 ** -MANTISSA_BITS[stored]
    normal_scale_OI = scale_OI >= torch.finfo(stored).smallest_normal
    limit_OI = np.where(normal_scale_OI, HALF_STEP + lost_steps, np.inf)
    assert (np.abs(back_OI - w) <= limit_OI * scale_OI).all()


@settings(deadline=None)
@given(st.data(), schemes, stored_dtypes)
def test_values_on_the_grid_are_kept_exactly(
    data: st.DataObject, scheme: Scheme, stored: torch.dtype
) -> None:
    """So quantizing twice changes nothing, and any code that can be stored can be reached."""
    qmin, qmax = scheme.grid.lowest, scheme.grid.highest
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([GROUP, 3 * GROUP]))
    shape = (rows, scheme.groups_of(width))
    codes_OI = torch.from_numpy(
        data.draw(arrays(np.int8, (rows, width), elements=st.integers(qmin, qmax)))
    )
    scale_OG = torch.from_numpy(data.draw(arrays(np.float32, shape, elements=magnitudes)))
    zeros = st.just(0) if scheme.symmetric else st.integers(qmin, qmax)
    zero_OG = torch.from_numpy(data.draw(arrays(np.int8, shape, elements=zeros)))
    qparams = Qparams(scale_OG.to(stored).float(), zero_OG)
    values_OI = dequantize(codes_OI, qparams, scheme)
    assert torch.equal(quantize(values_OI, qparams, scheme), codes_OI)
    exact_OI = (codes_OI.double().numpy() - spread(zero_OG, width)) * spread(
        qparams.scale_OG, width
    )
    assert np.array_equal(values_OI.numpy(), exact_OI.astype(np.float32))


@pytest.mark.parametrize("stored", MANTISSA_BITS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
def test_scales_hold_only_values_of_their_stored_dtype(scheme: Scheme, stored: torch.dtype) -> None:
    w_OI = normal(6, 40, seed=1) * 3
    scale_OG = choose_qparams(w_OI, scheme, stored=stored).scale_OG
    assert scale_OG.dtype == torch.float32
    groups_OGI = w_OI.double().numpy().reshape(6, scheme.groups_of(40), -1)
    low_OG, high_OG = np.minimum(groups_OGI.min(-1), 0), np.maximum(groups_OGI.max(-1), 0)
    span_OG = 2 * np.maximum(-low_OG, high_OG) if scheme.symmetric else high_OG - low_OG
    expected_OG = torch.from_numpy(span_OG / (2**scheme.bits - 1)).to(stored)
    assert torch.equal(scale_OG.to(stored).float(), scale_OG)
    if scheme.symmetric:
        assert torch.equal(scale_OG, expected_OG.float())
    else:  # the difference of the extremes is itself rounded: one unit in the last place
        ulp = 2.0 ** (1 - MANTISSA_BITS[stored])
        assert torch.allclose(scale_OG, expected_OG.float(), rtol=ulp, atol=0)


def test_the_scale_is_rounded_before_the_weights_are() -> None:
    """A solve and a replay from the artifact must see one grid."""
    scheme = Scheme(name="int8", group_size=None, zero_point="none")
    w_OI = torch.linspace(-8.5, 8.5, 64)[None]
    qparams = choose_qparams(w_OI, scheme, stored=torch.bfloat16)
    true_step = 17 / 255
    assert qparams.scale_OG.item() != np.float32(true_step)
    w = w_OI.double().numpy()
    scale_OI = np.full_like(w, qparams.scale_OG.item())
    codes_OI = round_plainly(w, scale_OI, np.zeros_like(w), 8)
    assert np.array_equal(quantize(w_OI, qparams, scheme).numpy(), codes_OI)
    other_OI = round_plainly(w, np.full_like(w, true_step), np.zeros_like(w), 8)
    assert not np.array_equal(codes_OI, other_OI)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
@pytest.mark.parametrize("tiny", [0.0, 1e-9])
def test_groups_of_nothing_come_back_as_zeros(scheme: Scheme, tiny: float) -> None:
    """A scale that float16 rounds to nothing must not become a division by zero."""
    w_OI = normal(3, 4 * GROUP, seed=2)
    w_OI[1] = tiny
    w_OI[2, GROUP : 2 * GROUP] = tiny
    qparams = choose_qparams(w_OI, scheme, stored=torch.float16)
    assert (qparams.scale_OG > 0).all()
    back_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
    assert back_OI.isfinite().all()
    assert (back_OI[1] == 0).all()
    if scheme.group_size is not None:
        assert (back_OI[2, GROUP : 2 * GROUP] == 0).all()
    assert back_OI[0].abs().max() > 0


def test_zero_is_always_on_the_grid_and_one_sided_rows_use_all_of_it() -> None:
    scheme = Scheme(name="int4", group_size=None, zero_point="int")
    w_OI = torch.stack([torch.linspace(1, 16, 16), torch.linspace(-16, -1, 16)])
    qparams = choose_qparams(w_OI, scheme, stored=torch.float32)
    assert qparams.zero_OG.flatten().tolist() == [-8, 7]
    codes_OI = quantize(w_OI, qparams, scheme)
    assert (codes_OI[0].max().item(), codes_OI[1].min().item()) == (7, -8)
    assert (quantize(torch.zeros(2, 16), qparams, scheme) == qparams.zero_OG).all()


def test_an_asymmetric_grid_is_finer_where_weights_are_lopsided() -> None:
    w_OI = normal(8, 64, seed=3).abs() + 0.5
    errors = []
    for zero_point in ("none", "int"):
        scheme = Scheme(name="int4", group_size=16, zero_point=zero_point)
        qparams = choose_qparams(w_OI, scheme, stored=torch.float32)
        back_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
        errors.append((w_OI - back_OI).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
def test_compressed_tensors_reads_codes_as_we_do(scheme: Scheme) -> None:
    w_OI = normal(32, 120, seed=4)
    qparams = choose_qparams(w_OI, scheme, stored=torch.float32)
    codes_OI = quantize(w_OI, qparams, scheme)
    args = library_args(scheme)
    library_codes_OI = library_quantize(
        w_OI, qparams.scale_OG, qparams.zero_OG, args, dtype=torch.int8
    )
    # the library rounds w / scale + zero, we round w / scale: ties may fall apart, nothing else
    apart_OI = codes_OI != library_codes_OI
    steps_OI = w_OI.double().numpy() / spread(qparams.scale_OG, 120)
    ties_OI = np.abs(steps_OI - np.floor(steps_OI) - 0.5) < 1e-4
    assert not (apart_OI.numpy() & ~ties_OI).any()
    assert apart_OI.float().mean() < 0.01
    theirs_OI = library_dequantize(codes_OI, qparams.scale_OG, qparams.zero_OG, args)
    assert torch.equal(dequantize(codes_OI, qparams, scheme), theirs_OI)


def reference_search(w_OI: Tensor, importance_I: Tensor, scheme: Scheme) -> Float:
    """The least weighted error of every group over all shrink factors, by trying each."""
    groups = scheme.groups_of(w_OI.shape[1])
    w_OGI = w_OI.double().numpy().reshape(len(w_OI), groups, -1)
    weight_GI = importance_I.double().numpy().reshape(groups, -1)
    low = np.minimum(w_OGI.min(-1, keepdims=True), 0)
    high = np.maximum(w_OGI.max(-1, keepdims=True), 0)
    levels = 2**scheme.bits
    errors = []
    for percent in range(60, 101, 2):
        shrink = percent / 100
        span = 2 * np.maximum(-low, high) if scheme.symmetric else high - low
        step = shrink * span / (levels - 1)
        zero = np.zeros_like(step)
        if not scheme.symmetric:
            zero = np.clip(np.rint(-levels / 2 - shrink * low / step), -levels / 2, levels / 2 - 1)
        back = (round_plainly(w_OGI, step, zero, scheme.bits) - zero) * step
        errors.append(((w_OGI - back) ** 2 * weight_GI).sum(-1))
    least: Float = np.min(errors, axis=0)
    return least


def weighted_error(w_OI: Tensor, importance_I: Tensor, qparams: Qparams, scheme: Scheme) -> Float:
    back_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
    error_OI = (w_OI.double() - back_OI.double()).square() * importance_I.double()
    return error_OI.reshape(len(w_OI), scheme.groups_of(w_OI.shape[1]), -1).sum(-1).numpy()


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
def test_the_search_finds_what_an_exhaustive_one_finds(scheme: Scheme) -> None:
    w_OI = normal(24, 64, seed=5) ** 3
    importance_I = normal(1, 64, seed=6)[0].square() + 1e-3
    qparams = search_qparams(w_OI, importance_I, scheme, stored=torch.float32)
    found_OG = weighted_error(w_OI, importance_I, qparams, scheme)
    assert np.allclose(found_OG, reference_search(w_OI, importance_I, scheme), rtol=1e-3)


@settings(deadline=None)
@given(weights, schemes, stored_dtypes, st.integers(0, 2**31))
def test_the_search_never_does_worse_than_the_extremes(
    w_OI: Tensor, scheme: Scheme, stored: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance_I = torch.rand(w_OI.shape[1], generator=generator).square()
    importance_I[torch.rand(w_OI.shape[1], generator=generator) < 0.2] = 0
    searched = search_qparams(w_OI, importance_I, scheme, stored=stored)
    plain = choose_qparams(w_OI, scheme, stored=stored)
    searched_OG = weighted_error(w_OI, importance_I, searched, scheme)
    plain_OG = weighted_error(w_OI, importance_I, plain, scheme)
    assert (searched_OG <= plain_OG * (1 + 1e-5)).all()
    assert torch.equal(searched.scale_OG.to(stored).float(), searched.scale_OG)


def test_an_outlier_that_no_input_excites_is_clipped() -> None:
    scheme = Scheme(name="int4", group_size=None, zero_point="none")
    w_OI = normal(4, 64, seed=7)
    w_OI[:, 9] = 8.0
    importance_I = torch.ones(64)
    importance_I[9] = 0.0
    searched = search_qparams(w_OI, importance_I, scheme, stored=torch.float32)
    plain = choose_qparams(w_OI, scheme, stored=torch.float32)
    assert (searched.scale_OG < 0.7 * plain.scale_OG).all()


def test_the_inputs_of_the_search_are_left_as_they_were() -> None:
    w_OI, importance_I = normal(4, 32, seed=8), torch.ones(32)
    kept = w_OI.clone(), importance_I.clone()
    search_qparams(w_OI, importance_I, SCHEMES[1], stored=torch.bfloat16)
    assert torch.equal(w_OI, kept[0])
    assert torch.equal(importance_I, kept[1])


FLOAT_ZERO = [Scheme(name="int4", group_size=size, zero_point="float") for size in (GROUP, None)]


@settings(deadline=None)
@given(weights, st.sampled_from(FLOAT_ZERO), stored_dtypes)
def test_a_float_zero_point_spreads_the_extremes_themselves(
    w_OI: Tensor, scheme: Scheme, stored: torch.dtype
) -> None:
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    scale_OI = spread(qparams.scale_OG, w_OI.shape[1])
    zero_OI = spread(qparams.zero_OG, w_OI.shape[1])
    for kept_OG in (qparams.scale_OG, qparams.zero_OG):
        assert torch.equal(kept_OG.to(stored).float(), kept_OG)
    codes_OI = quantize(w_OI, qparams, scheme)
    assert codes_OI.amin() >= -8 and codes_OI.amax() <= 7
    back_OI = dequantize(codes_OI, qparams, scheme).double().numpy()
    # of float32: relative to the terms, not to their sum, which may all but vanish
    terms_OI = codes_OI.double().numpy() * scale_OI, zero_OI
    rounding_OI = 1e-6 * (np.abs(terms_OI[0]) + np.abs(terms_OI[1]))
    assert (np.abs(back_OI - sum(terms_OI)) <= rounding_OI).all()
    w = w_OI.double().numpy()
    groups_OGI = w.reshape(len(w), scheme.groups_of(w.shape[1]), -1)
    size_OI = spread(torch.from_numpy(np.abs(groups_OGI).max(-1)), w.shape[1])
    # half a step, and what the rounding of scale and zero to their stored dtype moves
    lost = 2.0 ** -MANTISSA_BITS[stored]
    tiny = 16 * torch.finfo(stored).smallest_normal
    limit_OI = 0.5001 * scale_OI * (scale_OI < 1) + 18 * lost * (size_OI + scale_OI) + tiny
    one_value_OG = groups_OGI.max(-1) == groups_OGI.min(-1)
    one_value_OI = spread(torch.from_numpy(one_value_OG), w.shape[1]).astype(bool)
    limit_OI = np.where(one_value_OI, 18 * lost * size_OI + tiny, limit_OI)
    assert (np.abs(back_OI - w) <= limit_OI + 0.5001 * scale_OI * ~one_value_OI).all()


FLOAT8 = [Scheme(name="float8"), Scheme(name="float8", per_tensor=True)]


@settings(deadline=None)
@given(weights, st.sampled_from(FLOAT8), stored_dtypes)
def test_float8_codes_are_the_nearest_values(
    w_OI: Tensor, scheme: Scheme, stored: torch.dtype
) -> None:
    qparams = choose_qparams(w_OI, scheme, stored=stored)
    w = w_OI.double().numpy()
    largest_O = np.abs(w).max() if scheme.per_tensor else np.abs(w).max(1)
    expected_O = torch.from_numpy(np.broadcast_to(largest_O, len(w)) / 448).to(stored).float()
    expected_O = torch.where(expected_O > 0, expected_O, 1.0)
    ulp = 2.0 ** (1 - MANTISSA_BITS[stored])
    assert torch.allclose(qparams.scale_OG[:, 0], expected_O, rtol=ulp, atol=0)
    steps_OI = w / qparams.scale_OG.double().numpy()
    values_N, _ = float8_values()
    least_OI = np.abs(steps_OI[..., None] - values_N).min(-1)
    codes_OI = quantize(w_OI, qparams, scheme)
    got_OI = codes_OI.view(torch.float8_e4m3fn).double().numpy()
    assert (np.abs(got_OI - steps_OI) <= least_OI + 1e-6 * np.abs(steps_OI)).all()
    back_OI = dequantize(codes_OI, qparams, scheme)
    assert np.array_equal(
        back_OI.numpy(), (got_OI * qparams.scale_OG.double().numpy()).astype(np.float32)
    )
    # on the grid already, apart from the sign of a zero
    assert torch.equal(dequantize(quantize(back_OI, qparams, scheme), qparams, scheme), back_OI)


def test_one_scale_for_a_tensor_that_is_seen_in_parts() -> None:
    scheme = Scheme(name="float8", per_tensor=True)
    w_OI = normal(10, 24, seed=6)
    whole = choose_qparams(w_OI, scheme, stored=torch.bfloat16)
    assert whole.scale_OG.shape == (10, 1)
    assert len(whole.scale_OG.unique()) == 1
    largest = w_OI.abs().amax()
    part = choose_qparams(w_OI[:3], scheme, stored=torch.bfloat16, largest=largest)
    assert torch.equal(part.scale_OG, whole.scale_OG[:3])
