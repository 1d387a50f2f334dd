"""Affine quantization by blocks, against float64 twins that know blocks as slices of an array."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quantcore.primitives import (
    AffineGrid,
    AffineQparams,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from tests.grids import FLOAT8_GRIDS, GRIDS, INPUTS, INT8, ROUNDING, label
from tests.references import Float


@dataclass(frozen=True)
class Case:
    x: Tensor
    block_size: tuple[int, ...]

    def slices(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        return slices(tuple(self.x.shape), self.block_size)


def slices(
    shape: tuple[int, ...], block_size: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    for place in np.ndindex(*(n // size for n, size in zip(shape, block_size, strict=True))):
        yield (
            place,
            tuple(
                slice(i * size, (i + 1) * size) for i, size in zip(place, block_size, strict=True)
            ),
        )


def spread(per_block: Tensor, shape: tuple[int, ...], block_size: tuple[int, ...]) -> Float:
    """A value per block as a value per element, float64."""
    out = np.full(shape, np.nan)
    for place, inside in slices(shape, block_size):
        out[inside] = per_block.double().numpy()[place]
    return out


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = INPUTS) -> Case:
    """Tensors of one to four dimensions, any blocks, contiguous or not, from noise to constants."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    sizes = draw(st.lists(st.integers(1, 6), min_size=len(counts), max_size=len(counts)))
    assume(prod(counts) * prod(sizes) <= 600)
    shape = tuple(n * size for n, size in zip(counts, sizes, strict=True))
    shares = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1, 1, width=16))
    values = draw(arrays(np.float64, shape, elements=shares))
    values *= draw(st.floats(2.0**-14, 2.0**12))
    values += draw(st.one_of(st.just(0.0), st.floats(-100, 100)))
    x = torch.from_numpy(values).to(draw(st.sampled_from(dtypes)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        x = x.mT.contiguous().mT if x.dim() > 1 else x
    elif layout == "strided":
        x = torch.stack([x, x * 0 + 7], -1)[..., 0]
    return Case(x, tuple(sizes))


def work_rounding(*dtypes: torch.dtype) -> float:
    return max(ROUNDING[dtype] for dtype in dtypes)


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(GRIDS), st.sampled_from([None, *INPUTS]), st.booleans())
def test_values_come_back_within_half_a_step(
    case: Case, grid: AffineGrid, scale_dtype: torch.dtype | None, output_as_x: bool
) -> None:
    """Half a step, and the few roundings on the way: of the scale, 1 / s, x * (1 / s), z, q * s.

    Each shifts a value of n steps by n roundings, or a "float" zero by its own: next to nothing in
    float32, several steps where bfloat16 holds 8-bit codes. Nothing else is lost at the ends: the
    positive end of a symmetric range is half a step beyond the last code.
    """
    x, block_size = case.x, case.block_size
    output_dtype = x.dtype if output_as_x else torch.float32
    qparams = choose_qparams_affine(x, block_size, grid, scale_dtype=scale_dtype)
    codes = quantize_affine(x, block_size, qparams, grid)
    back = dequantize_affine(codes, block_size, qparams, grid, output_dtype=output_dtype)

    low, high = grid.limits
    assert codes.dtype == grid.dtype and codes.shape == back.shape == x.shape
    assert back.dtype == output_dtype
    assert codes.min() >= low and codes.max() <= high

    rounding = work_rounding(x.dtype, qparams.scale.dtype, output_dtype)
    for place, inside in case.slices():
        values = x[inside].double().numpy()
        step = float(qparams.scale[place])
        assert 0 < step < np.inf
        error = np.abs(back[inside].double().numpy() - values).max()
        carried = (high - low) * step + np.abs(values).max()
        assert error <= step / 2 + 8 * rounding * carried


@settings(deadline=None, max_examples=200)
@given(cases((torch.float32,)), st.sampled_from(GRIDS))
def test_qparams_codes_and_values_are_those_of_the_formulas(case: Case, grid: AffineGrid) -> None:
    x, block_size = case.x, case.block_size
    qparams = choose_qparams_affine(x, block_size, grid)
    codes = quantize_affine(x, block_size, qparams, grid)
    values = dequantize_affine(codes, block_size, qparams, grid)
    counts = [n // size for n, size in zip(x.shape, block_size, strict=True)]
    assert list(qparams.scale.shape) == counts
    assert (qparams.zero_point is None) == (grid.zero_point_domain == "none")

    low, high = grid.limits
    middle = (low + high + 1) / 2
    rounding = ROUNDING[torch.float32]
    for place, inside in case.slices():
        block = x[inside].double().numpy()
        scale = float(qparams.scale[place])
        assert scale == pytest.approx(expected_scale(block, grid), rel=4 * rounding)
        if qparams.zero_point is None:
            zero = 0.0
        else:
            assert list(qparams.zero_point.shape) == counts
            zero = float(qparams.zero_point[place])
            largest = float(np.abs(block).max())
            slack = 4 * rounding * (largest + (high - low) * scale)
            assert abs(zero - expected_zero(block, scale, grid)) <= (
                slack if grid.zero_point_domain == "float" else slack / scale + 0.5
            )

        if grid.zero_point_domain == "float":
            exact = (block - zero) / scale + middle
            expected_values = (codes[inside].double().numpy() - middle) * scale + zero
        else:
            exact = block / scale + zero
            expected_values = (codes[inside].double().numpy() - zero) * scale
        exact = np.clip(exact, low, high)
        in_float64 = high - low >= 2**24  # float32 would not tell these codes apart
        unsure = ROUNDING[torch.float64 if in_float64 else torch.float32] * (
            8 * (np.abs(block).max() / scale + abs(zero) + (high - low))
        )
        assert (np.abs(codes[inside].double().numpy() - exact) <= 0.5 + unsure).all()
        np.testing.assert_allclose(
            values[inside].double().numpy(),
            expected_values,
            rtol=4 * rounding,
            atol=4 * rounding * (np.abs(block).max() + (high - low) * scale),
        )


def expected_scale(block: Float, grid: AffineGrid) -> float:
    low, high = grid.limits
    least, most = float(block.min()), float(block.max())
    if grid.zero_point_domain != "float":
        least, most = min(least, 0.0), max(most, 0.0)
    if grid.mapping == "asymmetric":
        scale = (most - least) / (high - low)
    elif grid.mapping == "symmetric":
        scale = 2 * max(-least, most) / (high - low)
    else:  # codes of a range around 0 run from -n to n - 1, whatever they are called
        below, above = (high - low + 1) // 2, (high - low) // 2
        scale = max(-least / below, most / above)
    return max(scale, float(np.finfo(np.float32).tiny))


def expected_zero(block: Float, scale: float, grid: AffineGrid) -> float:
    low, high = grid.limits
    if grid.zero_point_domain == "float":  # the least value has the least code
        return float(block.min()) + scale * ((low + high + 1) / 2 - low)
    if grid.mapping == "asymmetric":
        return low - min(float(block.min()), 0.0) / scale
    return (low + high + 1) // 2


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(GRIDS), st.sampled_from([*INPUTS, torch.float64]))
def test_quantizing_again_changes_nothing(
    data: st.DataObject, grid: AffineGrid, dtype: torch.dtype
) -> None:
    """Any code, any scale: wherever the dtype between is fine enough to tell codes apart."""
    low, high = grid.limits
    roundings = 6 if grid.zero_point_domain == "float" else 3.1  # each moves by up to high - low
    assume(roundings * (high - low) * ROUNDING[dtype] < 0.5)
    shape, block_size = data.draw(
        st.sampled_from([((3, 8), (1, 4)), ((2, 3, 4), (1, 1, 4)), ((6,), (6,))])
    )
    counts = tuple(n // size for n, size in zip(shape, block_size, strict=True))
    codes = torch.from_numpy(
        data.draw(arrays(np.int64, shape, elements=st.integers(int(low), int(high))))
    ).to(grid.dtype)
    scale = torch.from_numpy(
        data.draw(arrays(np.float32, counts, elements=st.floats(2.0**-6, 2.0**6, width=32)))
    ).to(dtype)
    zero = None
    if grid.zero_point_domain == "float":
        share = data.draw(arrays(np.float32, counts, elements=st.floats(-1, 1, width=32)))
        zero = torch.from_numpy(share).to(dtype) * (high - low) * scale
    elif grid.zero_point_domain == "int":
        integers = st.integers(int(low), int(high))
        zero = torch.from_numpy(data.draw(arrays(np.int32, counts, elements=integers)))
    qparams = AffineQparams(scale, zero)
    values = dequantize_affine(codes, block_size, qparams, grid, output_dtype=dtype)
    assert values.isfinite().all()
    assert torch.equal(quantize_affine(values, block_size, qparams, grid), codes)


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.limits[1] < 256], ids=label)
def test_values_on_the_grid_are_kept_exactly(grid: AffineGrid, dtype: torch.dtype) -> None:
    """Scales that are powers of two: every dtype that tells the codes apart holds the values."""
    low, high = int(grid.limits[0]), int(grid.limits[1])
    every_code = torch.arange(low, high + 1, dtype=torch.int64)
    codes = torch.stack([every_code, every_code.flip(0)]).to(grid.dtype)
    scale = torch.tensor([[0.25], [4.0]], dtype=dtype)
    if grid.zero_point_domain == "float":
        half_codes = (high - low) % 2 == 0  # of 255 codes they take all of bfloat16's bits
        offset = torch.tensor([[0], [0 if half_codes else (low - high) // 2]])
        zero = offset * scale
        values = (codes.double() - grid.middle + offset) * scale.double()
    elif grid.zero_point_domain == "int":
        symmetric = grid.mapping != "asymmetric"
        middle = (low + high + 1) // 2
        zero = torch.tensor([[middle], [middle]] if symmetric else [[low], [high - 1]])
        zero = zero.to(torch.int32)
        values = (codes.double() - zero) * scale.double()
    else:
        zero = None
        values = codes.double() * scale.double()
    block_size = (1, codes.shape[1])
    x = values.to(dtype)
    assert torch.equal(x.double(), values)

    qparams = AffineQparams(scale, zero)
    assert torch.equal(quantize_affine(x, block_size, qparams, grid), codes)
    assert torch.equal(
        dequantize_affine(codes, block_size, qparams, grid, output_dtype=dtype).double(), values
    )
    if grid.mapping == "symmetric" and (high - low) % 2:
        return  # it would take the most negative value for half of the steps
    chosen = choose_qparams_affine(x, block_size, grid)
    assert torch.equal(chosen.scale, scale)
    if zero is not None:
        assert chosen.zero_point is not None and torch.equal(chosen.zero_point, zero)


@settings(deadline=None)
@given(st.floats(2.0**-6, 2.0**6, width=32), st.sampled_from([torch.float32, torch.bfloat16]))
@example(1.0, torch.float32)
def test_a_symmetric_range_loses_most_at_its_positive_end(
    largest: float, scale_dtype: torch.dtype
) -> None:
    """Its last code is half a step within; a scale that was rounded down takes that further."""
    x = torch.tensor([[-largest, largest]])
    qparams = choose_qparams_affine(x, (1, 2), INT8, scale_dtype=scale_dtype)
    codes = quantize_affine(x, (1, 2), qparams, INT8)
    back = dequantize_affine(codes, (1, 2), qparams, INT8)
    lost_steps = float((largest - back[0, 1].double()) / qparams.scale.double())
    assert codes.tolist()[0][1] in (126, 127)
    limit = 127.5 * ROUNDING[scale_dtype]
    assert abs(lost_steps - (127.5 - codes.tolist()[0][1])) <= limit * 1.01 + 1e-4

    unclipped = AffineGrid(dtype=torch.int8, mapping="symmetric_no_clipping_err")
    qparams = choose_qparams_affine(x, (1, 2), unclipped)
    assert quantize_affine(x, (1, 2), qparams, unclipped).tolist() == [[-127, 127]]
    assert float(qparams.scale) == np.float32(largest) / np.float32(127)


def finite_values(dtype: torch.dtype) -> Float:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
    found: Float = np.unique(every[np.isfinite(every)])
    return found


@settings(deadline=None)
@given(cases(), st.sampled_from(FLOAT8_GRIDS))
def test_float8_codes_are_the_nearest(case: Case, grid: AffineGrid) -> None:
    x, block_size = case.x, case.block_size
    qparams = choose_qparams_affine(x, block_size, grid)
    codes = quantize_affine(x, block_size, qparams, grid)
    assert codes.dtype == grid.dtype and qparams.zero_point is None
    table = finite_values(grid.dtype)
    scale = spread(qparams.scale, tuple(x.shape), block_size)
    exact = np.clip(x.double().numpy() / scale, table[0], table[-1])
    taken = np.abs(codes.double().numpy() - exact)
    nearest = np.abs(exact[..., None] - table).min(-1)
    assert (taken <= nearest + 2 * ROUNDING[torch.float32] * np.abs(exact)).all()
    for place, inside in case.slices():
        largest = float(x[inside].abs().max())
        exact_scale = largest / float(table[-1])
        # float16 has scales down to 6e-8 in steps of that
        spacing = 2.0**-24 if x.dtype is torch.float16 else 0.0
        assert float(qparams.scale[place]) == pytest.approx(
            exact_scale, rel=1.01 * ROUNDING[x.dtype], abs=spacing + 1e-37
        )
    again = quantize_affine(
        dequantize_affine(codes, block_size, qparams, grid), block_size, qparams, grid
    )
    assert torch.equal(again.float(), codes.float())


@pytest.mark.parametrize("grid", FLOAT8_GRIDS, ids=label)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_float8_saturates(grid: AffineGrid, dtype: torch.dtype) -> None:
    x = torch.tensor([[-60000.0, -1.0, 0.0, 1.0, 60000.0]], dtype=dtype)
    small = AffineQparams(torch.tensor([[0.5]]), None)
    most = torch.finfo(grid.dtype).max
    codes = quantize_affine(x, (1, 5), small, grid).float()
    assert codes.tolist() == [[-most, -2.0, 0.0, 2.0, most]]
    back = dequantize_affine(codes.to(grid.dtype), (1, 5), small, grid, output_dtype=dtype)
    assert back.dtype == dtype and back.float().tolist() == [[-most / 2, -1, 0, 1, most / 2]]
