"""The numerics of a solve on a CUDA device, at the sizes of real layers. Run with: pytest -m gpu"""

import pytest
import torch
from quantkernels.gram import gram
from torch import Tensor

from quantcore.affine import Qparams, dequantize, search_qparams
from quantcore.gptq import Factor, GptqConfig, factorize, solve
from quantcore.moments import Moments
from quantcore.schemes import Scheme

pytestmark = pytest.mark.gpu

INT4 = Scheme(name="int4", group_size=128, zero_point="none")


def tokens(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Inputs that move together, of unequal activity."""
    torch.manual_seed(width)
    causes_TC = torch.randn(count, 64, device="cuda")
    x_TI = causes_TC @ torch.randn(64, width, device="cuda") / 8
    x_TI += torch.randn(count, width, device="cuda")
    return (x_TI * torch.rand(width, device="cuda").add_(0.2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "width"), [(65_536, 4096), (16_384, 8192), (3000, 14_336)])
def test_gram_is_within_a_thousandth_of_float64(count: int, width: int, dtype: torch.dtype) -> None:
    x_TI = tokens(count, width, dtype)
    out_II = gram(x_TI, torch.zeros(width, width, device="cuda"))
    again_II = gram(x_TI, torch.zeros(width, width, device="cuda"))
    assert torch.equal(out_II.tril(), again_II.tril())
    for first in (0, width // 2, width - 300):
        rows = slice(first, first + 300)
        exact_RI = x_TI[:, rows].double().t() @ x_TI.double()
        lower_RI = torch.ones_like(exact_RI, dtype=torch.bool).tril(first)
        error_RI = torch.where(lower_RI, out_II[rows] - exact_RI, 0)
        assert error_RI.norm() <= 1e-3 * torch.where(lower_RI, exact_RI, 0).norm()
        assert error_RI.abs().max() <= 1e-3 * exact_RI.diagonal(first).mean()


def problem(width: int, rows: int) -> tuple[Tensor, Tensor, Qparams]:
    moments = Moments(torch.zeros(width, width, device="cuda"))
    moments.add(tokens(2 * width, width))
    h_II = moments.mean()
    w_OI = (torch.randn(rows, width, device="cuda") * 0.02).bfloat16()
    return w_OI, h_II, search_qparams(w_OI, h_II.diagonal(), INT4, stored=torch.bfloat16)


def objective(w_OI: Tensor, codes_OI: Tensor, qparams: Qparams, h_II: Tensor) -> float:
    delta_OI = w_OI.double() - dequantize(codes_OI, qparams, INT4).double()
    return float(((delta_OI @ h_II.double()) * delta_OI).sum().item())


@pytest.mark.parametrize(("width", "rows"), [(1024, 700), (4096, 1024)])
def test_a_solve_is_as_good_as_the_plain_float32_path(width: int, rows: int) -> None:
    w_OI, h_II, qparams = problem(width, rows)
    config = GptqConfig()
    factor = factorize(h_II, config)
    assert not factor.inverse
    codes_OI = solve(w_OI, qparams, INT4, factor, config.block_columns)
    on_cpu = Qparams(qparams.scale_OG.cpu(), qparams.zero_OG.cpu())
    plain = factorize(h_II.cpu(), config)
    plain_OI = solve(w_OI.cpu(), on_cpu, INT4, plain, config.block_columns).cuda()
    assert (codes_OI != plain_OI).float().mean() < 1e-3
    ours, theirs = (objective(w_OI, codes, qparams, h_II) for codes in (codes_OI, plain_OI))
    assert ours == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (100, 612), (1023, 1024)])
def test_rows_may_be_solved_in_tiles_of_any_height(first: int, last: int) -> None:
    w_OI, h_II, qparams = problem(1024, 1024)
    factor = factorize(h_II, GptqConfig())
    whole_OI = solve(w_OI, qparams, INT4, factor, 128)
    rows = slice(first, last)
    part = Qparams(qparams.scale_OG[rows], qparams.zero_OG[rows])
    assert torch.equal(solve(w_OI[rows], part, INT4, factor, 128), whole_OI[rows])


def factor_of(h_II: Tensor, damping: float) -> Factor:
    factor = factorize(h_II, GptqConfig(damping=damping))
    root_II = factor.upper_II.double()
    damped_II = h_II.double()[factor.order_I][:, factor.order_I]
    damped_II.diagonal().add_(factor.damping * h_II.diagonal().double().mean())
    assert (root_II @ root_II.t() - damped_II).norm() <= 1e-5 * damped_II.norm()
    return factor


def test_the_root_is_that_of_the_damped_hessian() -> None:
    assert factor_of(problem(1024, 1)[1], 0.01).damping == 0.01


def test_float64_factors_what_float32_cannot() -> None:
    h_II = torch.ones(512, 512, device="cuda")  # in float32, 1 + 1e-9 is 1
    assert torch.linalg.cholesky_ex(h_II)[1].item() > 0
    assert factor_of(h_II, 1e-9).damping == 1e-9


def test_tokens_left_out_are_counted_without_waiting() -> None:
    x_TI = tokens(100, 256)
    x_TI[7, 3], x_TI[50] = float("nan"), float("inf")
    moments = Moments(torch.zeros(256, 256, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments.add(x_TI)
        moments.add(x_TI)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (moments.tokens, moments.dropped) == (196, 4)
    assert moments.mean().isfinite().all()
