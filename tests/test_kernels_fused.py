"""The Triton kernels beside their plain-torch references, called without the dispatch.

On a machine with a GPU they run on it (`pytest -m gpu`); elsewhere in Triton's interpreter, at
sizes that it finishes in a moment. The interpreter multiplies bfloat16 wrongly and stores it
truncated, so there 16-bit inputs are float16. A GPU takes both, and the larger sizes.
"""

import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest
import torch
from quantkernels.gram import reference as gram_reference
from quantkernels.grids import GridName
from quantkernels.ranges import AffineRange
from quantkernels.ranges import reference as ranges_reference
from quantkernels.sweep import Columns
from torch import Tensor

from quantcore.schemes import ZeroPoint
from tests.references import float8_values
from tests.test_kernels_gram import NAN, assert_lower_is, inputs, strict_upper
from tests.test_kernels_sweep import (
    CLEAR,
    OTHER_GRIDS,
    columns,
    other_columns,
    other_reference,
    reference,
    same_codes,
    upper,
    weights,
)

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

pytestmark = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
if HAS_TRITON:
    from quantkernels.gram import fused as fused_gram
    from quantkernels.ranges import fused as fused_ranges
    from quantkernels.sweep import fused as fused_sweep

DEVICE = "cuda" if ON_GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
WIDTHS = [1, 8, 129, 257, *((1100, 4096, 8200) if ON_GPU else ())]
FACTORS = (1.0 - 0.02 * torch.arange(21, dtype=torch.float64)).float()


def zeros(width: int) -> Tensor:
    return torch.zeros(width, width, device=DEVICE)


def halves(tokens: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return inputs(tokens, width, dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 37, 130, *((5000,) if ON_GPU else ())])
def test_gram_is_the_product(tokens: int, width: int, dtype: torch.dtype) -> None:
    x_TI, out_II = halves(tokens, width, dtype), zeros(width)
    out_II[strict_upper(width).to(DEVICE)] = NAN
    assert fused_gram.gram(x_TI, out_II) is out_II
    # matrix units cut off what does not fit a sum, instead of rounding it
    assert_lower_is(out_II, x_TI, slack=1e-5 + 1e-8 * tokens)


def test_gram_adds_to_what_is_there_within_something_larger() -> None:
    x_TI, start_II = halves(40, 150), inputs(150, 150, seed=1).to(DEVICE)
    outer_II = torch.full((152, 200), NAN, device=DEVICE)
    outer_II[1:151, 20:170] = start_II
    fused_gram.gram(x_TI, outer_II[1:151, 20:170])
    assert_lower_is(outer_II[1:151, 20:170], x_TI, start_II)
    assert outer_II[0].isnan().all() and outer_II[151].isnan().all()
    assert outer_II[:, :20].isnan().all() and outer_II[:, 170:].isnan().all()


def test_gram_of_no_tokens_adds_nothing() -> None:
    start_II = inputs(20, 20, seed=2).to(DEVICE)
    assert torch.equal(fused_gram.gram(halves(0, 20), start_II.clone()), start_II)
    assert fused_gram.gram_of_finite(halves(0, 20), start_II.clone()).item() == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gram_takes_any_strides_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    wide_TI = halves(60, 300, dtype)
    for x_TI in (
        wide_TI[:, ::2],
        wide_TI[::3, 100:231],
        wide_TI[:, 1:],
        halves(130, 60, dtype).t(),
        halves(1, 70, dtype).expand(20, 70),
    ):
        width = x_TI.shape[1]
        found_II = fused_gram.gram(x_TI, zeros(width))
        assert_lower_is(found_II, x_TI)
        assert torch.equal(found_II, fused_gram.gram(x_TI.contiguous(), zeros(width)))


def test_gram_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_gram, "GRAM_PIECE", 48)
    x_TI = halves(130, 60)
    assert_lower_is(fused_gram.gram(x_TI, zeros(60)), x_TI)
    x_TI[100, 3] = NAN
    out_II = zeros(60)
    assert fused_gram.gram_of_finite(x_TI, out_II).item() == 1
    assert_lower_is(out_II, torch.cat([x_TI[:100], x_TI[101:]]))


@pytest.mark.skipif(not ON_GPU, reason="in the interpreter numpy makes the products")
@pytest.mark.parametrize("tile", ["SMALL", "NARROW", "WIDE"])
def test_tiles_do_not_change_bits(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TI = halves(300, 300)
    expected_II = fused_gram.gram(x_TI, zeros(300)).tril()
    monkeypatch.setattr(fused_gram, "_tile", lambda *_: getattr(fused_gram, tile))
    assert torch.equal(fused_gram.gram(x_TI, zeros(300)).tril(), expected_II)


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("dropped", [(), (0,), (3, 64, 99), tuple(range(100))], ids=len)
def test_tokens_that_are_not_finite_are_left_out_and_counted(
    dropped: tuple[int, ...], poison: float
) -> None:
    x_TI = halves(100, 70)
    clean_TI = x_TI.clone()
    for number, token in enumerate(dropped):
        x_TI[token, (number * 23) % 70] = poison
        clean_TI[token] = 0
    kept_TI = x_TI.clone()
    out_II, expected_II = zeros(70), zeros(70)
    count = fused_gram.gram_of_finite(x_TI, out_II)
    assert (count.item(), count.dtype, count.device.type) == (len(dropped), torch.int64, DEVICE)
    assert torch.equal(out_II.tril(), fused_gram.gram(clean_TI, expected_II).tril())
    assert gram_reference.gram_of_finite(x_TI, zeros(70)).item() == len(dropped)
    assert torch.equal(x_TI.nan_to_num(), kept_TI.nan_to_num())


def test_the_largest_finite_values_are_kept() -> None:
    x_TI = torch.full((3, 9), 65504.0, dtype=torch.float16, device=DEVICE)
    out_II = zeros(9)
    assert fused_gram.gram_of_finite(x_TI, out_II).item() == 0
    assert_lower_is(out_II, x_TI)


def root_of(width: int) -> Tensor:
    """V, with V V^T = H; what stands below its diagonal must not be read."""
    root_II = torch.from_numpy(np.linalg.inv(upper(width))).float()
    root_II[torch.ones(width, width, dtype=torch.bool).tril(-1)] = NAN
    return root_II.to(DEVICE)


def moved(grid: Columns, rows: slice = slice(None)) -> Columns:
    return dataclasses.replace(
        grid,
        scale_GO=grid.scale_GO[:, rows].to(DEVICE),
        zero_GO=grid.zero_GO[:, rows].to(DEVICE),
        group_of_I=grid.group_of_I.to(DEVICE),
    )


def swept(w_IO: Tensor, root_II: Tensor, grid: Columns, block_columns: int) -> Tensor:
    return fused_sweep.sweep_by_root(w_IO.to(DEVICE).clone(), root_II, grid, block_columns).cpu()


@pytest.mark.parametrize(
    ("width", "rows", "block_columns"),
    [
        *itertools.product((1, 7), (1, 33), (1, 16)),
        (70, 20, 16),
        (70, 20, 128),
        (130, 20, 128),
        *(itertools.product((511, 1100), (257, 1000), (16, 40, 128, 4096)) if ON_GPU else ()),
    ],
)
def test_clear_decisions_of_the_sweep_are_those_of_the_reference(
    width: int, rows: int, block_columns: int
) -> None:
    w_IO, grid = weights(width, rows), columns(width, rows)
    naive = reference(w_IO, upper(width), grid)
    codes_IO = swept(w_IO, root_of(width), moved(grid), block_columns)
    assert (codes_IO.shape, codes_IO.dtype) == ((width, rows), torch.int8)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.any()
    assert np.array_equal(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O])


@pytest.mark.parametrize("grid", OTHER_GRIDS)
@pytest.mark.parametrize(
    ("width", "rows"),
    [(1, 33), *(((70, 400), (1100, 1000), (130, 20_000)) if ON_GPU else ((70, 130),))],
)
def test_the_sweep_over_other_grids(grid: GridName, width: int, rows: int) -> None:
    w_IO, given = weights(width, rows), other_columns(grid, width, rows)
    # On GPUs a product's factors are two bfloat16 parts each: sums are off by 2**-17 or so of the
    # largest values, which in float8 are 32 apart, and not 2**-9 as around zero.
    least_gap = 32.0 if ON_GPU and grid == "float8" else 2.0**-9
    naive = other_reference(w_IO, upper(width), given, least_gap)
    codes_IO = swept(w_IO, root_of(width), moved(given), 16)
    clear_O = naive.margin_O > (2e-3 if grid == "offset" and width > 1000 else CLEAR)
    assert clear_O.any()
    assert same_codes(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O], grid)


def test_float8_is_rounded_as_torch_rounds_it() -> None:
    """Ties, zeros, subnormals, and what is beyond the largest."""
    beside = (1, 1 + 2**-9, 1 - 2**-9) if ON_GPU else (1, 1 + 2**-9)
    values = torch.cat([torch.from_numpy(float8_values()[0]) * scale for scale in beside])
    ties = (values[1:] + values[:-1]) / 2
    w_O = torch.cat([values, ties, torch.tensor([1e-9, -1e-9, 500.0, -1e30, 2**-10, 3 * 2**-10])])
    count = 1000 if ON_GPU else 200
    w_O = torch.cat([w_O.float(), torch.randn(count) * 2.0 ** torch.randint(-12, 9, (count,))])
    grid = Columns(
        grid="float8",
        scale_GO=torch.ones(1, len(w_O)),
        zero_GO=torch.zeros(1, len(w_O)),
        group_of_I=torch.zeros(1, dtype=torch.int64),
        qmin=-448,
        qmax=448,
    )
    codes_IO = swept(w_O[None], torch.ones(1, 1, device=DEVICE), moved(grid), 16)
    expected_O = w_O.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)
    assert same_codes(codes_IO[0].numpy(), expected_O.numpy(), "float8")


def test_weights_far_outside_the_grid_take_its_ends() -> None:
    w_IO = torch.tensor([[1e10, -5.0, 0.0, 1e30, -1e30, 3.0]])
    scale_GO = torch.tensor([[2e-38, 2e-38, 2e-38, 1.0, 1.0, 0.5]])
    grid = Columns(
        scale_GO=scale_GO,
        zero_GO=torch.zeros(1, 6),
        group_of_I=torch.zeros(1, dtype=torch.int64),
        qmin=-8,
        qmax=7,
    )
    codes_IO = swept(w_IO, torch.ones(1, 1, device=DEVICE), moved(grid), 128)
    assert codes_IO.tolist() == [[7, -8, 0, 7, -8, 6]]


def test_a_sweep_of_several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_sweep, "SWEEP_SPAN", 32)
    w_IO, grid = weights(100, 20), columns(100, 20)
    naive = reference(w_IO, upper(100), grid)
    codes_IO = swept(w_IO, root_of(100), moved(grid), 16)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.any()
    assert np.array_equal(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O])


@pytest.mark.parametrize(
    ("width", "rows"), [(20, 40), *(((1100, 1000), (300, 20_000)) if ON_GPU else ())]
)
def test_a_rows_codes_do_not_depend_on_the_rows_beside_it(width: int, rows: int) -> None:
    w_IO, grid, root_II = weights(width, rows), columns(width, rows), root_of(width)
    whole_IO = swept(w_IO, root_II, moved(grid), 32)
    for first, last in ((0, 1), (3, 36), (rows - 5, rows), (1, rows)):
        part = moved(grid, slice(first, last))
        assert torch.equal(
            swept(w_IO[:, first:last].contiguous(), root_II, part, 32), whole_IO[:, first:last]
        )


def test_the_sweep_takes_any_strides_and_uses_up_the_weights_alone() -> None:
    w_IO, grid, root_II = weights(70, 9), moved(columns(70, 9)), root_of(70)
    expected_IO = swept(w_IO, root_II, grid, 16)
    given = [t.clone() for t in (root_II, grid.scale_GO, grid.zero_GO, grid.group_of_I)]
    strided = Columns(
        scale_GO=grid.scale_GO.t().contiguous().t(),
        zero_GO=grid.zero_GO.repeat_interleave(2, dim=1)[:, ::2],
        group_of_I=grid.group_of_I.repeat_interleave(3)[::3],
        qmin=grid.qmin,
        qmax=grid.qmax,
    )
    assert torch.equal(swept(w_IO, root_II.t().contiguous().t(), strided, 16), expected_IO)
    now = (root_II, grid.scale_GO, grid.zero_GO, grid.group_of_I)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, now, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
@pytest.mark.parametrize(
    ("rows", "groups", "size"),
    [(1, 1, 1), (70, 3, 32), (5, 2, 5), (3, 1, 1100), *(((999, 8, 128),) if ON_GPU else ())],
)
def test_the_range_search_finds_the_references_ranges(
    rows: int, groups: int, size: int, zero_point: ZeroPoint, dtype: torch.dtype
) -> None:
    w_OGI = inputs(rows, groups * size, dtype).reshape(rows, groups, size).to(DEVICE)
    w_OGI[0] = 0
    importance_GI = inputs(groups, size, seed=3).square().to(DEVICE)
    kind = AffineRange(qmin=-8, qmax=7, zero_point=zero_point, stored=dtype)
    factors_S = FACTORS.to(DEVICE)
    found = fused_ranges.search(w_OGI, importance_GI, kind, factors_S)
    expected = ranges_reference.search(w_OGI, importance_GI, kind, factors_S)
    # torch divides by a number as it likes, and a float zero point is a small difference of what is
    # as large as the range, 15 scales; errors that are equal but for their last bits may be told
    # apart the other way
    zeros_size_OG = torch.maximum(expected[1].float().abs(), 15 * expected[0])
    for found_OG, expected_OG, size_OG in zip(
        found, expected, (expected[0], zeros_size_OG), strict=True
    ):
        assert found_OG.shape == (rows, groups)
        apart_OG = (found_OG.float() - expected_OG.float()).abs()
        same_OG = apart_OG <= 1e-6 * size_OG  # which NaN is not
        assert (~same_OG).float().mean() <= 1e-3
    zero_dtype = torch.float32 if zero_point == "float" else torch.int8
    assert (found[0].dtype, found[1].dtype) == (torch.float32, zero_dtype)


def test_the_range_search_takes_any_strides() -> None:
    wide_OGI = inputs(20, 4 * 60).reshape(20, 4, 60).to(DEVICE)
    importance_GI = inputs(4, 60, seed=3).square().to(DEVICE)
    kind = AffineRange(qmin=-8, qmax=7, zero_point="none", stored=torch.float32)
    for w_OGI, weight_GI in (
        (wide_OGI[::2, ::2, ::3], importance_GI[::2, ::3]),
        (wide_OGI.permute(2, 1, 0), importance_GI[:, :20]),
    ):
        found = fused_ranges.search(w_OGI, weight_GI, kind, FACTORS.to(DEVICE))
        same = fused_ranges.search(w_OGI.contiguous(), weight_GI, kind, FACTORS.to(DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
