"""The column sweep against its float64 twin, at odd shapes and over poisoned memory."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from quantkernels.grids import GridName
from quantkernels.sweep import Columns, sweep, sweep_by_root
from torch import Tensor

from tests.references import (
    Float,
    NaiveResult,
    correlated_inputs,
    float8_values,
    second_moment,
    sweep_columns,
    sweep_over_values,
    upper_factor,
)

CLEAR = 2e-4  # of a step: nearer to a rounding boundary, float32 may fall the other way
BITS = 4
GROUPS = 3


@functools.cache
def upper(width: int, seed: int = 0) -> Float:
    h_II = second_moment(correlated_inputs(2 * width + 8, width, seed))
    return upper_factor(h_II + 0.05 * np.diag(h_II).mean() * np.eye(width))


def weights(width: int, rows: int, seed: int = 1) -> Tensor:
    return torch.randn(width, rows, generator=torch.Generator().manual_seed(seed))


def columns(width: int, rows: int, seed: int = 2) -> Columns:
    """Groups in no order at all, as act-order leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return Columns(
        scale_GO=0.3 + 0.2 * torch.rand(GROUPS, rows, generator=generator),
        zero_GO=torch.randint(-4, 5, (GROUPS, rows), generator=generator).float(),
        group_of_I=torch.randint(0, GROUPS, (width,), generator=generator),
        qmin=-8,
        qmax=7,
    )


def reference(w_IO: Tensor, upper_II: Float, grid: Columns) -> NaiveResult:
    scale_OI = grid.scale_GO[grid.group_of_I].t().double().numpy()
    zero_OI = grid.zero_GO[grid.group_of_I].t().double().numpy()
    return sweep_columns(w_IO.t().double().numpy(), upper_II, scale_OI, zero_OI, BITS)


@pytest.mark.parametrize(
    ("width", "block_columns"),
    [
        *itertools.product((1, 7, 130), (1, 7, 128, 4096)),
        *itertools.product((511, 513, 700), (16, 128)),
        (700, 4096),
    ],
)
def test_clear_decisions_are_those_of_the_reference(width: int, block_columns: int) -> None:
    rows = 33
    w_IO, upper_II, grid = weights(width, rows), upper(width), columns(width, rows)
    naive = reference(w_IO, upper_II, grid)
    codes_IO = sweep(w_IO.clone(), torch.from_numpy(upper_II).float(), grid, block_columns)
    assert (codes_IO.shape, codes_IO.dtype) == ((width, rows), torch.int8)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.mean() > 0.5
    assert np.array_equal(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O])


OTHER_GRIDS = ("offset", "float8")


def other_columns(grid: GridName, width: int, rows: int) -> Columns:
    affine = columns(width, rows)
    if grid == "offset":
        return dataclasses.replace(affine, grid=grid, zero_GO=0.3 * affine.zero_GO + 0.07)
    # small enough a scale that some weights are clipped, and large enough that some are subnormal
    scale_GO = affine.scale_GO / 120
    return dataclasses.replace(affine, grid=grid, scale_GO=scale_GO, qmin=-448, qmax=448)


def other_reference(
    w_IO: Tensor, upper_II: Float, grid: Columns, least_gap: float = 2.0**-9
) -> NaiveResult:
    scale_OI = grid.scale_GO[grid.group_of_I].t().double().numpy()
    zero_OI = grid.zero_GO[grid.group_of_I].t().double().numpy()
    table = np.arange(-8.0, 8.0), np.arange(-8, 8)
    if grid.grid == "float8":
        table, zero_OI = float8_values(), np.zeros_like(zero_OI)
    w = w_IO.t().double().numpy()
    return sweep_over_values(w, upper_II, [table] * len(w_IO), scale_OI, zero_OI, least_gap)


def same_codes(found_OI: Float, expected_OI: Float, grid: GridName) -> bool:
    """Float8 has two zeros."""
    zeros = (found_OI & 127 == 0) & (expected_OI & 127 == 0) & (grid == "float8")
    return bool(((found_OI == expected_OI) | zeros).all())


@pytest.mark.parametrize("grid", OTHER_GRIDS)
@pytest.mark.parametrize(("width", "block_columns"), [(1, 7), (7, 128), (65, 16), (130, 128)])
@pytest.mark.parametrize("by_root", [False, True])
def test_other_grids(grid: GridName, width: int, block_columns: int, by_root: bool) -> None:
    rows = 400
    w_IO, upper_II, given = weights(width, rows), upper(width), other_columns(grid, width, rows)
    naive = other_reference(w_IO, upper_II, given)
    factor_II = torch.from_numpy(np.linalg.inv(upper_II) if by_root else upper_II).float()
    run = sweep_by_root if by_root else sweep
    codes_IO = run(w_IO.clone(), factor_II, given, block_columns)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.mean() > 0.4
    assert same_codes(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O], grid)


@pytest.mark.parametrize("rows", [1, 2, 257])
def test_any_number_of_rows(rows: int) -> None:
    w_IO, upper_II, grid = weights(65, rows, seed=4), upper(65), columns(65, rows)
    naive = reference(w_IO, upper_II, grid)
    codes_IO = sweep(w_IO.clone(), torch.from_numpy(upper_II).float(), grid, 32)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.any()
    assert np.array_equal(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O])


def test_what_stands_below_the_diagonal_is_never_read() -> None:
    w_IO, grid = weights(70, 9), columns(70, 9)
    upper_II = torch.from_numpy(upper(70)).float()
    expected_IO = sweep(w_IO.clone(), upper_II, grid, 16)
    poisoned_II = upper_II.clone()
    poisoned_II[torch.ones(70, 70, dtype=torch.bool).tril(-1)] = float("nan")
    assert torch.equal(sweep(w_IO.clone(), poisoned_II, grid, 16), expected_IO)


def test_factor_and_grid_may_have_any_strides() -> None:
    w_IO, grid = weights(70, 9), columns(70, 9)
    upper_II = torch.from_numpy(upper(70)).float()
    strided = Columns(
        scale_GO=grid.scale_GO.t().contiguous().t(),
        zero_GO=grid.zero_GO.repeat_interleave(2, dim=1)[:, ::2],
        group_of_I=grid.group_of_I.repeat_interleave(3)[::3],
        qmin=grid.qmin,
        qmax=grid.qmax,
    )
    strided_II = upper_II.t().contiguous().t()
    assert not any(
        t.is_contiguous()
        for t in (strided.scale_GO, strided.zero_GO, strided.group_of_I, strided_II)
    )
    got_IO = sweep(w_IO.clone(), strided_II, strided, 16)
    # the products may be made in another order over other strides
    clear_O = reference(w_IO, upper(70), grid).margin_O > CLEAR
    assert clear_O.sum() >= 5
    assert torch.equal(got_IO[:, clear_O], sweep(w_IO.clone(), upper_II, grid, 16)[:, clear_O])


def test_only_the_weights_are_used_up() -> None:
    w_IO, grid = weights(40, 5), columns(40, 5)
    upper_II = torch.from_numpy(upper(40)).float()
    kept = [t.clone() for t in (upper_II, grid.scale_GO, grid.zero_GO, grid.group_of_I)]
    sweep(w_IO, upper_II, grid, 8)
    now = (upper_II, grid.scale_GO, grid.zero_GO, grid.group_of_I)
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


@pytest.mark.parametrize(
    ("width", "block_columns"),
    [*itertools.product((1, 7, 130), (1, 7, 128, 4096)), (513, 16), (700, 128)],
)
def test_the_root_leads_to_the_same_codes_as_the_inverse(width: int, block_columns: int) -> None:
    rows = 33
    w_IO, upper_II, grid = weights(width, rows), upper(width), columns(width, rows)
    naive = reference(w_IO, upper_II, grid)
    root_II = torch.from_numpy(np.linalg.inv(upper_II)).float()
    root_II[torch.ones(width, width, dtype=torch.bool).tril(-1)] = float("nan")
    codes_IO = sweep_by_root(w_IO.clone(), root_II, grid, block_columns)
    assert (codes_IO.shape, codes_IO.dtype) == ((width, rows), torch.int8)
    clear_O = naive.margin_O > CLEAR
    assert clear_O.mean() > 0.5
    assert np.array_equal(codes_IO.t().numpy()[clear_O], naive.codes_OI[clear_O])


def test_a_diagonal_factor_hands_no_error_on() -> None:
    w_IO, grid = weights(50, 6), columns(50, 6)
    codes_IO = sweep(w_IO.clone(), torch.diag(torch.arange(1.0, 51.0)), grid, 16)
    assert np.array_equal(codes_IO.t().numpy(), reference(w_IO, np.eye(50), grid).codes_OI)
