"""X^T X against float64, at odd shapes, over strides and over poisoned memory.

Only the lower triangle of the result is promised, and only it is compared.
"""

import subprocess
import sys

import pytest
import torch
from quantkernels.gram import gram, gram_of_finite
from torch import Tensor

NAN = float("nan")
WIDTHS = [1, 2, 191, 192, 193, 511, 700, 1100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strict_upper(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu(1)


def assert_lower_is(
    out_II: Tensor, x_TI: Tensor, start_II: Tensor | None = None, slack: float = 1e-5
) -> None:
    """Within `slack` of the sum of the products' sizes, the scale on which float32 sums round."""
    x_TI = x_TI.double()
    expected_II = x_TI.t() @ x_TI
    size_II = x_TI.abs().t() @ x_TI.abs()
    if start_II is not None:
        expected_II = expected_II + start_II.double()
        size_II = size_II + start_II.double().abs()
    error_II = ((out_II.double() - expected_II).abs() - slack * size_II).tril()
    assert (error_II <= 0).all()  # NaN is not <= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_lower_triangle_is_the_product(width: int, dtype: torch.dtype) -> None:
    x_TI = inputs(37, width, dtype)
    out_II = torch.zeros(width, width)
    assert gram(x_TI, out_II) is out_II
    assert_lower_is(out_II, x_TI)


def test_many_tokens_in_bfloat16_are_multiplied_exactly() -> None:
    """Enough of them for CPUs that have such products to take them."""
    x_TI = inputs(4096, 400, torch.bfloat16)
    assert_lower_is(gram(x_TI, torch.zeros(400, 400)), x_TI)


def test_float32_products_are_none_the_less_exact_afterwards() -> None:
    x_TI = inputs(600, 600)
    gram(x_TI.bfloat16(), torch.zeros(600, 600))
    error_II = (x_TI @ x_TI).double() - x_TI.double() @ x_TI.double()
    assert error_II.abs().max() < 1e-3  # one with bfloat16 products is off by 0.3


def test_tokens_whose_sum_overflows_are_not_left_out() -> None:
    x_TI = torch.tensor([[3e38, 3e38], [1.0, 2.0]])
    out_II = torch.zeros(2, 2)
    assert gram_of_finite(x_TI, out_II) == 0
    assert out_II[1, 0].isinf()


@pytest.mark.parametrize("width", WIDTHS)
def test_it_adds_to_what_is_there(width: int) -> None:
    x_TI, start_II = inputs(9, width), inputs(width, width, seed=1)
    out_II = gram(x_TI, start_II.clone())
    assert_lower_is(out_II, x_TI, start_II)


@pytest.mark.parametrize("width", WIDTHS)
def test_poison_above_the_diagonal_stays_there(width: int) -> None:
    x_TI = inputs(5, width)
    out_II = torch.zeros(width, width)
    out_II[strict_upper(width)] = NAN
    gram(x_TI, out_II)
    assert out_II.tril().isfinite().all()
    assert_lower_is(out_II, x_TI)


@pytest.mark.parametrize("width", [1, 513])
def test_no_tokens_add_nothing(width: int) -> None:
    start_II = inputs(width, width, seed=2)
    assert torch.equal(gram(torch.empty(0, width), start_II.clone()), start_II)


@pytest.mark.parametrize("width", [1, 511, 513])
def test_one_token(width: int) -> None:
    x_TI = inputs(1, width)
    assert_lower_is(gram(x_TI, torch.zeros(width, width)), x_TI)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    wide_TI = inputs(60, 1400, dtype)
    transposed_TI = inputs(700, 60, dtype).t()
    for x_TI in (wide_TI[:, ::2], wide_TI[::3, 100:613], transposed_TI):
        assert not x_TI.is_contiguous()
        width = x_TI.shape[1]
        assert_lower_is(gram(x_TI, torch.zeros(width, width)), x_TI)


def test_one_row_for_all_tokens() -> None:
    x_TI = inputs(1, 513).expand(20, 513)
    assert_lower_is(gram(x_TI, torch.zeros(513, 513)), x_TI)


def test_the_result_may_be_a_part_of_something_larger() -> None:
    x_TI = inputs(8, 600)
    outer_II = torch.full((602, 700), NAN)
    inner_II = outer_II[1:601, 50:650]
    inner_II.zero_()
    gram(x_TI, inner_II)
    assert_lower_is(inner_II, x_TI)
    assert outer_II[0].isnan().all()
    assert outer_II[:, 650:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_narrow_inputs_are_exact(dtype: torch.dtype) -> None:
    """One token: nothing is summed, so each entry is one product, rounded to float32 at most."""
    x_TI = inputs(1, 40, dtype) * 3
    out_II = gram(x_TI, torch.zeros(40, 40)).tril()
    exact_II = (x_TI.double().t() @ x_TI.double()).tril()
    assert torch.equal(out_II, exact_II.float())


def test_inputs_are_left_as_they_were() -> None:
    x_TI = inputs(6, 30)
    kept_TI = x_TI.clone()
    gram(x_TI, torch.zeros(30, 30))
    assert torch.equal(x_TI, kept_TI)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_are_left_out_and_counted(
    dtype: torch.dtype, poison: float
) -> None:
    x_TI, out_II = inputs(20, 30, dtype), torch.zeros(30, 30)
    kept = [token for token in range(20) if token not in (3, 11)]
    x_TI[3, 0] = x_TI[11, 29] = poison
    dropped = gram_of_finite(x_TI, out_II)
    assert (dropped.item(), dropped.dtype) == (2, torch.int64)
    assert_lower_is(out_II, x_TI[kept])


def test_importing_the_kernels_needs_no_triton() -> None:
    """Machines without a GPU have none, and a query of the GPU at import would start it."""
    program = (
        "import sys, quantkernels.gram, quantkernels.sweep, quantkernels.ranges, quantkernels.bits;"
        "import torch; "
        "kernels = [name for name in sys.modules if name.startswith('quantkernels')];"
        "assert kernels and not any('fused' in name for name in kernels);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
