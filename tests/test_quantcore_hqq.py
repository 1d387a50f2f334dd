"""HQQ against the same algorithm in float64, and what it promises of every group."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcore import hqq
from quantcore.affine import Qparams, choose_qparams, dequantize, quantize
from quantcore.hqq import HqqConfig, hqq_qparams
from quantcore.schemes import SCHEME_KINDS, IntegerGrid, Scheme, every_form

Float = npt.NDArray[np.float64]

FORMS = [
    scheme
    for name, kind in SCHEME_KINDS.items()
    if isinstance(kind.weights, IntegerGrid)
    for scheme in every_form(name, [16])
]
INT4 = [Scheme(name="int4", group_size=64, zero_point=zero) for zero in ("none", "int", "float")]
every_form_of_a_grid = pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)


def weights(rows: int = 24, width: int = 256, seed: int = 0, heavy: float = 0.5) -> Tensor:
    """Normal weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(heavy * torch.randn(rows, width, generator=generator))
    return 0.03 * spread * torch.randn(rows, width, generator=generator)


def solved(w_OI: Tensor, scheme: Scheme, config: HqqConfig | None = None) -> Tensor:
    qparams = hqq_qparams(w_OI, scheme, config or HqqConfig(), stored=w_OI.dtype)
    return dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)


def plainly(w_OI: Tensor, scheme: Scheme) -> Qparams:
    return choose_qparams(w_OI, scheme, stored=w_OI.dtype)


def objective(w_OI: Tensor, qparams: Qparams, scheme: Scheme, config: HqqConfig) -> Tensor:
    """By group, float64, errors in steps of the plain grid."""
    rounded_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
    step_OG1 = plainly(w_OI, scheme).scale_OG.double()[..., None]
    error_OI = (w_OI.double() - rounded_OI.double()).abs()
    groups_OGI = error_OI.reshape(*step_OG1.shape[:2], -1) / step_OG1
    return groups_OGI.pow(config.power / 256).sum(-1)


@dataclasses.dataclass
class Twin:
    total: float  # the objective, in the first steps
    clear: bool  # no weight was halfway between two codes, so that float32 sees the same ones


def naive(w_I: Float, scheme: Scheme, config: HqqConfig, scale: float, zero: float) -> Twin:
    """One group, step by step as the formulas have it."""
    low, high, p = scheme.grid.lowest, scheme.grid.highest, config.power / 256
    step, beta, least, margin = scale, config.first_beta(scheme), np.inf, np.inf
    for _ in range(config.iterations + 1):
        offset = zero if scheme.zero_point == "float" else 0.0
        steps_I = (w_I - offset) / scale
        whole = zero if scheme.zero_point == "int" else 0.0
        below_I = np.floor(steps_I)
        inside_I = (below_I + whole >= low) & (below_I + whole < high)  # else both end in one code
        margin = min(margin, np.abs(steps_I - below_I - 0.5)[inside_I].min(initial=0.5))
        d_I = np.clip(np.rint(steps_I) + whole, low, high) - whole
        r_I = (w_I - (d_I * scale + offset)) / step
        size_I = np.abs(r_I)
        least = min(least, (size_I**p).sum())
        pull_I = np.where(size_I > 0, np.maximum(size_I, 1e-300) ** (p - 1), 0) / beta
        target_I = w_I - np.sign(r_I) * np.maximum(0, size_I - pull_I) * step
        if scheme.zero_point != "float":
            scale = (target_I @ target_I) / (d_I @ target_I)
        else:
            zero = (target_I - d_I * scale).mean()
        beta *= config.growth
    return Twin(least, margin > 1e-5 * max(1, high / 8))


CONFIGS = [
    HqqConfig(),
    HqqConfig(norm=1.0, beta=3.0, growth=1.1, iterations=7),
    HqqConfig(norm=0.5, beta=10.0),
]


@every_form_of_a_grid
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_float64_twin_comes_to_the_same_objective(scheme: Scheme, config: HqqConfig) -> None:
    w_OI = weights(48, 32)
    if scheme.symmetric:  # a largest weight below 0 begins at -7.5 steps, halfway
        groups_NI = w_OI.reshape(-1, scheme.group_size or 32)
        largest_N1 = groups_NI.gather(1, groups_NI.abs().argmax(1, keepdim=True))
        w_OI = (groups_NI * largest_N1.sign()).reshape(w_OI.shape)
    qparams = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    ours = objective(w_OI, qparams, scheme, config).flatten()
    plain = plainly(w_OI, scheme)
    groups = w_OI.double().reshape(len(ours), -1).numpy()
    starts = zip(plain.scale_OG.flatten().tolist(), plain.zero_OG.flatten().tolist(), strict=True)
    twins = [naive(w_I, scheme, config, *at) for w_I, at in zip(groups, starts, strict=True)]
    clear = [number for number, twin in enumerate(twins) if twin.clear]
    assert len(clear) > 0.8 * len(twins)
    for number in clear:
        assert ours[number].item() == pytest.approx(twins[number].total, rel=1e-3)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Scheme, HqqConfig]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from([16, 48, 80]))
    w_OI = torch.randn(rows, width, generator=generator)
    w_OI = w_OI * torch.exp(draw(st.sampled_from([0.0, 1.0, 3.0])) * w_OI)
    w_OI = w_OI + draw(st.sampled_from([0.0, 0.0, 1.5, -40.0]))
    w_OI = w_OI * draw(st.sampled_from([1e-42, 1e-20, 0.02, 1.0, 1e4, 1e37]))
    w_OI[:, : draw(st.sampled_from([0, 0, 16, width]))] = draw(st.sampled_from([0.0, -0.37]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    largest = torch.finfo(dtype).max
    config = HqqConfig(
        norm=draw(st.sampled_from([0.1, 0.7, 1.0])),
        beta=draw(st.sampled_from([None, 0.01, 10.0, 1e6])),
        growth=draw(st.sampled_from([1.0, 1.01, 10.0])),
        iterations=draw(st.sampled_from([1, 20])),
    )
    return w_OI.clamp(-largest, largest).to(dtype), draw(st.sampled_from(FORMS)), config


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_group_is_worse_than_plainly_rounded(case: tuple[Tensor, Scheme, HqqConfig]) -> None:
    w_OI, scheme, config = case
    qparams = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    plain = plainly(w_OI, scheme)
    assert torch.equal(qparams.scale_OG, qparams.scale_OG.to(w_OI.dtype).float())
    assert (qparams.scale_OG > 0).all() and qparams.zero_OG.dtype == plain.zero_OG.dtype
    if scheme.zero_point == "float":
        assert torch.equal(qparams.zero_OG, qparams.zero_OG.to(w_OI.dtype).float())
        assert torch.equal(qparams.scale_OG, plain.scale_OG)
    else:
        assert torch.equal(qparams.zero_OG, plain.zero_OG)
    codes_OI = quantize(w_OI, qparams, scheme)
    assert codes_OI.min() >= scheme.grid.lowest and codes_OI.max() <= scheme.grid.highest
    ours_OG = objective(w_OI, qparams, scheme, config)
    plain_OG = objective(w_OI, plain, scheme, config)
    assert (ours_OG <= plain_OG * (1 + 1e-5)).logical_or(plain_OG.isnan()).all()


@pytest.mark.parametrize("scheme", INT4, ids=Scheme.label)
def test_most_groups_are_better_than_plainly_rounded(scheme: Scheme) -> None:
    w_OI, config = weights(width=512), HqqConfig()
    ours_OG = objective(w_OI, hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype), scheme, config)
    plain_OG = objective(w_OI, plainly(w_OI, scheme), scheme, config)
    assert (ours_OG < 0.999 * plain_OG).float().mean() > 0.5
    assert ours_OG.sum() < 0.99 * plain_OG.sum()


@pytest.mark.parametrize("scheme", INT4, ids=Scheme.label)
def test_weights_do_not_shrink(scheme: Scheme) -> None:
    """Least squares in the units of the weights would take one per cent of them."""
    w_OI = weights(width=512, heavy=0.0)
    assert (solved(w_OI, scheme) * w_OI).sum() / w_OI.square().sum() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("scheme", [s for s in FORMS if not s.symmetric], ids=Scheme.label)
def test_weights_on_the_grid_stay_as_they_are(scheme: Scheme) -> None:
    low, high = scheme.grid.lowest, scheme.grid.highest
    generator = torch.Generator().manual_seed(3)
    codes_OI = torch.randint(low, high + 1, (6, 32), generator=generator)
    codes_OI[:, ::16], codes_OI[:, 1::16] = low, high
    w_OI = (codes_OI + 3) * 0.125
    assert torch.equal(solved(w_OI, scheme), w_OI)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_symmetric_grid_is_found_again(bits: int) -> None:
    """Plain rounding misses it: it spreads max|w| over half a step more than the codes have."""
    scheme = Scheme(name=f"int{bits}")
    low, high = scheme.grid.lowest, scheme.grid.highest
    codes_OI = torch.arange(low, high + 1).repeat(2, 2)
    w_OI = codes_OI * 0.01
    plain = plainly(w_OI, scheme)
    rounded_OI = dequantize(quantize(w_OI, plain, scheme), plain, scheme)
    ours = (solved(w_OI, scheme, HqqConfig(iterations=60)) - w_OI).abs().max()
    assert ours < 0.02 * (rounded_OI - w_OI).abs().max()


@every_form_of_a_grid
def test_what_hqq_stored_is_rounded_no_further(scheme: Scheme) -> None:
    """A second time finds nothing that the first grid, still at hand, would not do as well."""
    once_OI = solved(weights(8, 64), scheme)
    moved = (solved(once_OI, scheme) - once_OI).norm()
    plain = plainly(once_OI, scheme)
    rounded = (dequantize(quantize(once_OI, plain, scheme), plain, scheme) - once_OI).norm()
    assert moved <= rounded * (1 + 1e-5)


@every_form_of_a_grid
@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 20), (23, 24)])
def test_a_row_has_the_same_bits_in_any_company(scheme: Scheme, first: int, last: int) -> None:
    w_OI, config = weights(width=208), HqqConfig()
    whole = hqq_qparams(w_OI, scheme, config, stored=torch.bfloat16)
    part = hqq_qparams(w_OI[first:last], scheme, config, stored=torch.bfloat16)
    assert torch.equal(part.scale_OG, whole.scale_OG[first:last])
    assert torch.equal(part.zero_OG, whole.zero_OG[first:last])


@pytest.mark.parametrize("scheme", INT4, ids=Scheme.label)
def test_bits_do_not_hang_on_chunks_or_threads(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_OI, config = weights(700, 128), HqqConfig()
    whole = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    monkeypatch.setattr(hqq, "CHUNK_OF_A_CPU", 7000)
    chunked = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    monkeypatch.undo()
    torch.set_num_threads(2)
    threaded = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    torch.set_num_threads(1)
    for other in (chunked, threaded):
        assert torch.equal(other.scale_OG, whole.scale_OG)
        assert torch.equal(other.zero_OG, whole.zero_OG)


@pytest.mark.parametrize("scheme", INT4, ids=Scheme.label)
def test_larger_weights_are_the_same_weights(scheme: Scheme) -> None:
    w_OI, config = weights(), HqqConfig()
    small = hqq_qparams(w_OI, scheme, config, stored=w_OI.dtype)
    large = hqq_qparams(w_OI * 1024, scheme, config, stored=w_OI.dtype)
    assert torch.equal(small.scale_OG * 1024, large.scale_OG)
    assert torch.equal(quantize(w_OI, small, scheme), quantize(w_OI * 1024, large, scheme))


def test_the_weights_are_left_alone() -> None:
    w_OI = weights()
    before_OI = w_OI.clone()
    hqq_qparams(w_OI, Scheme(name="int4", group_size=1), HqqConfig(), stored=w_OI.dtype)
    hqq_qparams(w_OI, Scheme(name="int8"), HqqConfig(), stored=w_OI.dtype)
    assert torch.equal(w_OI, before_OI)


@pytest.mark.parametrize("norm", [0.1, 0.5, 0.7, 0.75, 0.999, 1.0])
def test_powers_are_made_of_square_roots(norm: float) -> None:
    config = dataclasses.replace(HqqConfig(), norm=norm)
    assert abs(config.power / 256 - norm) <= 1 / 512
    x_JN = torch.tensor([[0.0, 1e-40, 1e-8, 0.3, 1.0, 7.5, 3e38]])
    exact_JN = x_JN.double().pow(config.power / 256)
    torch.testing.assert_close(hqq._power(x_JN, config.power).double(), exact_JN, rtol=2e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_a_gpu_finds_the_same_bits(scheme: Scheme) -> None:
    w_OI = weights(512, 1024).bfloat16()
    here = hqq_qparams(w_OI, scheme, HqqConfig(), stored=w_OI.dtype)
    there = hqq_qparams(w_OI.cuda(), scheme, HqqConfig(), stored=w_OI.dtype)
    assert torch.equal(here.scale_OG, there.scale_OG.cpu())
    assert torch.equal(here.zero_OG, there.zero_OG.cpu())
