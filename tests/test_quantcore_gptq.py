"""GPTQ against float64 twins (references.py).

Codes are compared on rows whose every decision was clear in float64: nearer than CLEAR to a
rounding boundary, float32 may rightly fall the other way and take the rest of the row with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, dequantize, quantize
from quantcore.errors import SolveError
from quantcore.gptq import Factor, GptqConfig, factorize, solve
from quantcore.schemes import Scheme
from tests.references import (
    Float,
    NaiveResult,
    correlated_inputs,
    naive_gptq,
    optimal_brain_quantizer,
    output_error,
    second_moment,
    spread,
)

CLEAR = 1e-3  # of a step: far above what float32 moves a weight by
SCHEMES = [
    Scheme(name="int4", group_size=32, zero_point="none"),
    Scheme(name="int4", group_size=32, zero_point="int"),
    Scheme(name="int4", group_size=None, zero_point="none"),
    Scheme(name="int8", group_size=None, zero_point="int"),
]
INT4 = SCHEMES[0]


@pytest.fixture(params=["inverse", "root"], autouse=True)
def by_inverse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Everything here holds for the CPU's factor and for the one that GPUs use."""
    if request.param == "root":
        monkeypatch.setattr("quantcore.gptq.FUSED_DEVICES", ("cpu",))
    return bool(request.param == "inverse")


def hessian_of(factor: Factor) -> Float:
    """What was factored: H, damped and in order."""
    upper_II = factor.upper_II.double().numpy()
    assert (np.tril(upper_II, -1) == 0).all()
    root_II: Float = np.linalg.inv(upper_II) if factor.inverse else upper_II
    return root_II @ root_II.T


@dataclass(frozen=True)
class Problem:
    w_OI: Tensor
    h_II: Tensor  # float32, as factorize takes it
    scheme: Scheme
    qparams: Qparams

    @property
    def exact_h_II(self) -> Float:
        h: Float = self.h_II.double().numpy()
        return h

    def codes(self, config: GptqConfig | None = None) -> Tensor:
        config = config or GptqConfig()
        factor = factorize(self.h_II, config)
        return solve(self.w_OI, self.qparams, self.scheme, factor, config.block_columns)

    def error(self, codes_OI: Tensor) -> float:
        back_OI = dequantize(codes_OI, self.qparams, self.scheme).double()
        return output_error(self.w_OI.double() - back_OI, self.exact_h_II)

    def naive(
        self, config: GptqConfig, solver: Callable[..., NaiveResult] = naive_gptq
    ) -> NaiveResult:
        h_II = self.exact_h_II
        damped_II = h_II + config.damping * np.diag(h_II).mean() * np.eye(len(h_II))
        order_I = np.arange(len(h_II))
        if config.act_order:
            order_I = np.argsort(-np.diag(h_II), kind="stable")
        width = self.w_OI.shape[1]
        return solver(
            self.w_OI.double().numpy(),
            damped_II,
            spread(self.qparams.scale_OG, width),
            spread(self.qparams.zero_OG, width),
            self.scheme.bits,
            order_I,
        )


def problem(
    scheme: Scheme = INT4,
    rows: int = 64,
    width: int = 96,
    seed: int = 0,
    silent: tuple[int, ...] = (),
) -> Problem:
    x_TI = correlated_inputs(4 * width, width, seed)
    x_TI[:, list(silent)] = 0
    w_OI = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))
    h_II = torch.from_numpy(second_moment(x_TI)).float()
    qparams = choose_qparams(w_OI, scheme, stored=torch.float32)
    return Problem(w_OI, h_II, scheme, qparams)


@pytest.mark.parametrize("block_columns", [1, 7, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
def test_every_clear_decision_is_that_of_the_naive_solver(
    scheme: Scheme, act_order: bool, block_columns: int
) -> None:
    given = problem(scheme)
    config = GptqConfig(act_order=act_order, block_columns=block_columns)
    codes_OI = given.codes(config)
    naive = given.naive(config)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.mean() > 0.7
    assert np.array_equal(codes_OI.numpy()[clear_O], naive.codes_OI[clear_O])
    naive_error = given.error(torch.from_numpy(naive.codes_OI))
    assert given.error(codes_OI) == pytest.approx(naive_error, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES[1:3], ids=Scheme.label)
def test_the_factor_stands_for_one_inverse_per_column(scheme: Scheme) -> None:
    """Against the update that GPTQ derives from, with H inverted afresh at every column."""
    given = problem(scheme, width=32)
    naive = given.naive(GptqConfig(), optimal_brain_quantizer)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.mean() > 0.7
    assert np.array_equal(given.codes().numpy()[clear_O], naive.codes_OI[clear_O])


def test_block_columns_do_not_change_the_method() -> None:
    given = problem(rows=128, width=256, seed=3)
    errors = [given.error(given.codes(GptqConfig(block_columns=n))) for n in (1, 7, 128, 1000)]
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_move_less_than_under_plain_rounding(
    scheme: Scheme, act_order: bool, seed: int
) -> None:
    given = problem(scheme, seed=10 * seed)
    plain = given.error(quantize(given.w_OI, given.qparams, scheme))
    assert given.error(given.codes(GptqConfig(act_order=act_order))) < 0.8 * plain


def test_uncorrelated_inputs_leave_nothing_to_gain_over_rounding() -> None:
    given = problem(SCHEMES[1])
    diagonal = Problem(given.w_OI, given.h_II.diagonal().diag(), given.scheme, given.qparams)
    assert torch.equal(diagonal.codes(), quantize(given.w_OI, given.qparams, given.scheme))


def test_the_most_active_inputs_are_rounded_first() -> None:
    given = problem()
    diagonal_I = given.h_II.diagonal()
    order_I = factorize(given.h_II, GptqConfig()).order_I
    assert sorted(order_I.tolist()) == list(range(96))
    assert (diagonal_I[order_I].diff() <= 0).all()
    plain = factorize(given.h_II, GptqConfig(act_order=False)).order_I
    assert plain.tolist() == list(range(96))


def test_act_order_does_not_depend_on_how_the_inputs_are_numbered() -> None:
    given = problem(SCHEMES[2])
    shuffled_I = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    h_II = given.h_II[shuffled_I][:, shuffled_I]
    other = Problem(given.w_OI[:, shuffled_I], h_II, given.scheme, given.qparams)
    clear_O = given.naive(GptqConfig()).margin_O > CLEAR
    assert clear_O.mean() > 0.7
    assert torch.equal(other.codes()[clear_O], given.codes()[:, shuffled_I][clear_O])


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_that_of_the_damped_hessian(by_inverse: bool, act_order: bool) -> None:
    given = problem()
    factor = factorize(given.h_II, GptqConfig(damping=0.05, act_order=act_order))
    assert (factor.damping, factor.inverse) == (0.05, by_inverse)
    h_II = given.exact_h_II[np.ix_(factor.order_I.numpy(), factor.order_I.numpy())]
    damped_II = h_II + 0.05 * np.diag(h_II).mean() * np.eye(96)
    assert np.allclose(damped_II @ np.linalg.inv(hessian_of(factor)), np.eye(96), atol=1e-4)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_column_costs_what_later_ones_cannot_make_up_for(
    by_inverse: bool, act_order: bool
) -> None:
    given = problem()
    factor = factorize(given.h_II, GptqConfig(act_order=act_order))
    assert factor.inverse == by_inverse
    damped_II = given.exact_h_II + 0.01 * np.diag(given.exact_h_II).mean() * np.eye(96)
    order_I, costs_I = factor.order_I.numpy(), factor.column_costs().double().numpy()
    for place in (0, 1, 50, 94, 95):
        column, later = order_I[place], order_I[place + 1 :]
        towards = damped_II[column, later]
        made_up = towards @ np.linalg.solve(damped_II[np.ix_(later, later)], towards)
        assert np.isclose(costs_I[column], damped_II[column, column] - made_up, rtol=1e-3)


SILENT = (0, 17, 40, 41, 95)


@pytest.mark.parametrize("act_order", [True, False])
def test_silent_inputs_are_rounded_plainly_and_disturb_nothing(act_order: bool) -> None:
    given = problem(silent=SILENT)
    config = GptqConfig(act_order=act_order)
    assert factorize(given.h_II, config).silent_inputs == len(SILENT)
    codes_OI = given.codes(config)
    plain_OI = quantize(given.w_OI, given.qparams, given.scheme)
    assert torch.equal(codes_OI[:, SILENT], plain_OI[:, SILENT])
    # other weights there, on the same grid: not one code of the other inputs may move
    other_OI = given.w_OI.clone()
    other_OI[:, SILENT] = -other_OI[:, SILENT] + 0.25
    other = Problem(other_OI, given.h_II, given.scheme, given.qparams)
    awake = [i for i in range(96) if i not in SILENT]
    assert torch.equal(other.codes(config)[:, awake], codes_OI[:, awake])
    assert not torch.equal(other.codes(config)[:, SILENT], codes_OI[:, SILENT])


def test_an_input_that_hardly_fires_is_not_silent() -> None:
    h_II = problem().h_II.clone()
    h_II[5] *= 1e-6
    h_II[:, 5] *= 1e-6
    assert factorize(h_II, GptqConfig()).silent_inputs == 0


def with_least_eigenvalue(share_of_mean: float) -> Tensor:
    """A symmetric matrix whose diagonal is all ones, so that its mean is 1."""
    h_II = torch.eye(6)
    h_II[0, 1] = h_II[1, 0] = 1.0 - share_of_mean
    return h_II


@pytest.mark.parametrize(
    ("least", "damping"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)]
)
def test_damping_grows_tenfold_until_it_suffices_and_is_reported(
    least: float, damping: float
) -> None:
    h_II = with_least_eigenvalue(least)
    factor = factorize(h_II, GptqConfig(damping=0.01))
    assert factor.damping == pytest.approx(damping)
    damped_II = h_II.double().numpy() + damping * np.eye(6)
    assert np.allclose(hessian_of(factor), damped_II, atol=1e-4)


def test_a_singular_hessian_takes_more_damping_than_float32_can_lose(by_inverse: bool) -> None:
    h_II = torch.ones(8, 8)
    factor = factorize(h_II, GptqConfig(damping=1e-9))
    if by_inverse:
        assert 1e-9 < factor.damping <= 1e-6 * (1 + 1e-9)
    else:  # float64 was asked before the damping grew
        assert factor.damping == 1e-9
    assert factor.upper_II.isfinite().all()


@pytest.mark.parametrize("rank", [1, 3])
def test_fewer_tokens_than_inputs_still_solve(rank: int) -> None:
    given = problem()
    x_TI = correlated_inputs(rank, 96, seed=8)
    h_II = torch.from_numpy(second_moment(x_TI)).float()
    short = Problem(given.w_OI, h_II, given.scheme, given.qparams)
    plain = short.error(quantize(given.w_OI, given.qparams, given.scheme))
    assert short.error(short.codes()) < 0.2 * plain


def test_a_hopelessly_indefinite_hessian_is_refused_with_what_was_tried() -> None:
    with pytest.raises(SolveError, match=r"not positive definite even with damping 10 "):
        factorize(with_least_eigenvalue(-50.0), GptqConfig(damping=0.01))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (3, 5)])
def test_a_hessian_that_is_not_finite_is_refused(poison: float, place: tuple[int, int]) -> None:
    h_II = problem().h_II.clone()
    h_II[place] = h_II[place[::-1]] = poison
    with pytest.raises(SolveError, match="not usable"):
        factorize(h_II, GptqConfig())


def test_a_hessian_of_zeros_is_refused() -> None:
    with pytest.raises(SolveError, match="mean diagonal is 0"):
        factorize(torch.zeros(4, 4), GptqConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_as_they_were(dtype: torch.dtype) -> None:
    given = problem()
    w_OI = given.w_OI.to(dtype)
    factor = factorize(given.h_II, GptqConfig())
    tensors = [w_OI, given.h_II, *_tensors_of(given.qparams), *_tensors_of(factor)]
    kept = [tensor.clone() for tensor in tensors]
    solve(w_OI, given.qparams, given.scheme, factor, 16)
    factorize(given.h_II, GptqConfig(act_order=False))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def _tensors_of(value: Qparams | Factor) -> list[Tensor]:
    if isinstance(value, Qparams):
        return [value.scale_OG, value.zero_OG]
    return [value.order_I, value.upper_II]


@pytest.mark.parametrize("cut", [1, 50, 96])
def test_rows_may_be_solved_in_tiles(cut: int) -> None:
    """Rows are independent. A product may round otherwise for another number of rows, so equal
    codes are promised where every decision is clear, and an equal error everywhere."""
    given = problem(SCHEMES[1], rows=160)
    factor = factorize(given.h_II, GptqConfig())
    tiles = []
    for rows in (slice(0, cut), slice(cut, 160)):
        qparams = Qparams(given.qparams.scale_OG[rows], given.qparams.zero_OG[rows])
        tiles.append(solve(given.w_OI[rows], qparams, given.scheme, factor, 32))
    whole_OI = given.codes(GptqConfig(block_columns=32))
    clear_O = given.naive(GptqConfig()).margin_O > CLEAR
    assert clear_O[:cut].any()
    assert clear_O[cut:].any()
    assert torch.equal(torch.cat(tiles)[clear_O], whole_OI[clear_O])
    assert given.error(torch.cat(tiles)) == pytest.approx(given.error(whole_OI), rel=1e-3)


def test_codes_keep_to_the_range_of_the_scheme() -> None:
    given = problem(SCHEMES[1])
    narrow = Qparams(0.2 * given.qparams.scale_OG, given.qparams.zero_OG)  # clips most weights
    codes_OI = Problem(given.w_OI, given.h_II, given.scheme, narrow).codes()
    assert codes_OI.dtype == torch.int8
    assert (codes_OI.min().item(), codes_OI.max().item()) == (-8, 7)
