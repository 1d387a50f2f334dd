"""Affine quantization by blocks at its edges: zeros, strides, dtypes, and what is refused."""

import pytest
import torch

from quantcore.primitives import (
    AffineGrid,
    AffineQparams,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from tests.grids import FLOAT8_GRIDS, GRIDS, INPUTS, INT8, label


@pytest.mark.parametrize("grid", GRIDS + FLOAT8_GRIDS, ids=label)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_zeros_stay_zeros(grid: AffineGrid, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 4, dtype=dtype)
    for block_size in [(2, 3, 4), (1, 1, 4), (1, 1, 1)]:
        qparams = choose_qparams_affine(x, block_size, grid)
        codes = quantize_affine(x, block_size, qparams, grid)
        back = dequantize_affine(codes, block_size, qparams, grid, output_dtype=dtype)
        assert (qparams.scale > 0).all() and torch.equal(back, x)


@pytest.mark.parametrize("grid", GRIDS, ids=label)
def test_a_constant_block_comes_back(grid: AffineGrid) -> None:
    """In "asymmetric" to the last bits; a symmetric range has no code for its positive end."""
    x = torch.tensor([[3.7], [-3.7], [1e-30], [-250.0]]).expand(4, 8)
    qparams = choose_qparams_affine(x, (1, 4), grid)
    back = dequantize_affine(quantize_affine(x, (1, 4), qparams, grid), (1, 4), qparams, grid)
    if grid.mapping == "asymmetric":
        assert torch.allclose(back, x, rtol=1e-6, atol=0)
    else:
        assert ((back - x).abs() <= qparams.scale[:, :1] * 0.51).all()


def test_zero_is_kept_by_integer_zero_points() -> None:
    x = torch.cat([torch.zeros(5, 1), torch.rand(5, 31) * 3 + 1], 1)
    for grid in GRIDS:
        qparams = choose_qparams_affine(x, (1, 32), grid)
        back = dequantize_affine(quantize_affine(x, (1, 32), qparams, grid), (1, 32), qparams, grid)
        if grid.zero_point_domain != "float":
            assert (back[:, 0] == 0).all()


@pytest.mark.parametrize("grid", [INT8, GRIDS[-1], GRIDS[-2], *FLOAT8_GRIDS], ids=label)
def test_strides_do_not_matter(grid: AffineGrid) -> None:
    base = torch.randn(8, 6, 10, generator=torch.Generator().manual_seed(0))
    one_row = base[:1].expand(4, -1, -1)
    for x in (base.permute(2, 0, 1), base[::2, :, 1::3], base.transpose(0, 1)[1:4], one_row):
        assert not x.is_contiguous()
        for block_size in [tuple(x.shape), (1, 1, x.shape[2]), (1, 2, 1), (x.shape[0], 1, 1)]:
            if x.shape[1] % block_size[1]:
                continue
            strided = choose_qparams_affine(x, block_size, grid)
            dense = choose_qparams_affine(x.contiguous(), block_size, grid)
            assert torch.equal(strided.scale, dense.scale)
            codes = quantize_affine(x, block_size, strided, grid)
            dense_codes = quantize_affine(x.contiguous(), block_size, dense, grid)
            assert torch.equal(codes.float(), dense_codes.float())
            turned = codes.transpose(0, 2).contiguous().transpose(0, 2)
            assert torch.equal(
                dequantize_affine(turned, block_size, strided, grid),
                dequantize_affine(dense_codes, block_size, dense, grid),
            )


def test_every_granularity_is_a_block_size() -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    largest = {
        (2, 6, 8): x.abs().amax().reshape(1, 1, 1),  # the tensor
        (1, 1, 8): x.abs().amax(2, keepdim=True),  # tokens
        (2, 6, 1): x.abs().amax((0, 1), keepdim=True),  # channels
        (1, 1, 4): x.abs().reshape(2, 6, 2, 4).amax(3),  # groups
        (1, 3, 4): x.abs().reshape(2, 2, 3, 2, 4).amax((2, 4)),  # tiles
        (1, 1, 1): x.abs(),
    }
    for block_size, expected in largest.items():
        scale = choose_qparams_affine(x, block_size, INT8).scale
        assert torch.equal(scale, expected / 127.5)


def test_tensors_without_dimensions_or_values() -> None:
    x = torch.tensor(-2.0)
    qparams = choose_qparams_affine(x, (), INT8)
    assert qparams.scale.shape == ()
    assert quantize_affine(x, (), qparams, INT8).item() in (-127, -128)  # it is -127.5 steps
    for empty, block_size in [(torch.zeros(0, 8), (1, 8)), (torch.zeros(3, 0), (1, 4))]:
        qparams = choose_qparams_affine(empty, block_size, INT8)
        codes = quantize_affine(empty, block_size, qparams, INT8)
        assert codes.shape == empty.shape
        assert dequantize_affine(codes, block_size, qparams, INT8).shape == empty.shape


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("codes_dtype", [torch.int16, torch.int32], ids=str)
def test_the_ends_of_wide_codes_do_not_wrap(codes_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """32,767 is 32,768 in bfloat16 and float16, and so is 2**31 - 1 in float32."""
    x = torch.tensor([-1000.0, -1.0, 0.0, 1.0, 1000.0], dtype=dtype)
    for mapping in ("symmetric", "asymmetric"):
        grid = AffineGrid(dtype=codes_dtype, mapping=mapping)
        one = AffineQparams(torch.tensor([2.0**-24]), torch.tensor([0], dtype=torch.int32))
        codes = quantize_affine(x, (5,), one, grid).tolist()
        own = torch.iinfo(codes_dtype)
        unit = min(2**24, own.max)
        assert codes == [own.min, max(-(2**24), own.min), 0, unit, own.max]
        chosen = choose_qparams_affine(x, (5,), grid, scale_dtype=torch.float32)
        codes = quantize_affine(x, (5,), chosen, grid)
        assert codes[0] < -30000 and codes[-1] > 30000 and codes.sort().values.equal(codes)


def test_a_scale_that_would_vanish_is_raised() -> None:
    x = torch.tensor([[1e-6, -1e-6, 0.0], [1.0, -1.0, 0.0]])
    qparams = choose_qparams_affine(x, (1, 3), INT8, scale_dtype=torch.float16)
    assert (1.0 / qparams.scale).isfinite().all()
    back = dequantize_affine(
        quantize_affine(x, (1, 3), qparams, INT8), (1, 3), qparams, INT8, output_dtype=x.dtype
    )
    assert ((back - x).abs() <= qparams.scale.float() * 0.55).all()


def test_eps_is_the_least_scale() -> None:
    x = torch.tensor([[0.01, -0.02], [10.0, 5.0]])
    scale = choose_qparams_affine(x, (1, 2), INT8, eps=0.01).scale
    assert scale.flatten().tolist() == pytest.approx([0.01, 10 / 127.5], rel=1e-6)
    default = choose_qparams_affine(torch.zeros(2, dtype=torch.float16), (2,), INT8).scale
    assert default.item() == torch.finfo(torch.float16).smallest_normal


def test_dtypes_of_what_is_chosen() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    plain = choose_qparams_affine(x, (1, 8), INT8)
    assert plain.scale.dtype == torch.bfloat16
    assert plain.zero_point is not None and plain.zero_point.dtype == torch.int32
    tinygemm = AffineGrid(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=15,
        mapping="asymmetric",
        zero_point_domain="float",
    )
    for zero_point_dtype in (None, torch.float32):
        zero = choose_qparams_affine(x, (1, 8), tinygemm, zero_point_dtype=zero_point_dtype)
        assert zero.zero_point is not None
        assert zero.zero_point.dtype == (zero_point_dtype or torch.bfloat16)
    byte = choose_qparams_affine(
        x, (1, 8), INT8, scale_dtype=torch.float32, zero_point_dtype=torch.int8
    )
    assert byte.scale.dtype == torch.float32
    assert byte.zero_point is not None and byte.zero_point.dtype == torch.int8
    assert choose_qparams_affine(x, (1, 8), FLOAT8_GRIDS[0]).scale.dtype == torch.float32


def test_gradients_stop_at_the_codes() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    qparams = choose_qparams_affine(x, (1, 4), INT8)
    assert not qparams.scale.requires_grad
    assert not quantize_affine(x, (1, 4), qparams, INT8).requires_grad


X = torch.ones(4, 6)
SCALES = AffineQparams(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32))


@pytest.mark.parametrize("block_size", [(6,), (1, 1, 6), ()], ids=str)
def test_a_block_size_of_another_length_is_refused(block_size: tuple[int, ...]) -> None:
    message = r"block_size: .*; write one for each dimension of \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        choose_qparams_affine(X, block_size, INT8)
    with pytest.raises(ValueError, match=message):
        quantize_affine(X, block_size, SCALES, INT8)
    with pytest.raises(ValueError, match=message):
        dequantize_affine(X.to(torch.int8), block_size, SCALES, INT8)


@pytest.mark.parametrize(
    ("block_size", "message"),
    [
        ((1, 4), r"block_size: 4 of \(1, 4\) does not divide 6 .* write a divisor of 6"),
        ((8, 6), r"block_size: 8 of \(8, 6\) does not divide 4 .* write a divisor of 4"),
        ((1, 0), r"block_size: \(1, 0\) makes empty blocks; write 1 or more"),
        ((-1, 6), r"block_size: \(-1, 6\) makes empty blocks; write 1 or more"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_are_refused(block_size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_qparams_affine(X, block_size, INT8)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": torch.int4}, "dtype: torch.int4 is not taken; write torch.uint8 or torch.int8"),
        ({"dtype": torch.float32}, "dtype: torch.float32 is not taken"),
        ({"mapping": "affine"}, "mapping: affine is not taken; write symmetric or"),
        ({"zero_point_domain": "FLOAT"}, "zero_point_domain: FLOAT is not taken; write none or"),
        ({"quant_max": 128}, "quant_min, quant_max: -128 to 128 is no range of torch.int8; write"),
        ({"quant_min": -200}, "quant_min, quant_max: -200 to 127 is no range"),
        ({"quant_min": 7, "quant_max": 7}, "quant_min, quant_max: 7 to 7 is no range"),
        ({"quant_min": 7, "quant_max": -8}, "quant_min, quant_max: 7 to -8 is no range"),
        ({"dtype": FP8, "zero_point_domain": "none", "quant_max": 500}, "-448.0 to 500 is no"),
        ({"zero_point_domain": "float"}, "mapping: 'symmetric' has no 'float' zero; write 'asym"),
        ({"mapping": "asymmetric", "zero_point_domain": "none"}, "zero_point_domain: 'asymmetric'"),
        ({"dtype": torch.uint8, "zero_point_domain": "none"}, "codes from 0 to 255 need a zero"),
        ({"dtype": FP8}, "zero_point_domain: torch.float8_e4m3fn has no zero point; write 'none'"),
        (
            {"dtype": FP8, "mapping": "asymmetric", "zero_point_domain": "none"},
            "zero_point_domain: torch.float8_e4m3fn has no zero point; write 'none', and 'symm",
        ),
        (
            {"mapping": "symmetric_no_clipping_err", "quant_min": -1, "quant_max": 0},
            "mapping: 'symmetric_no_clipping_err' needs codes on either side of zero",
        ),
    ],
    ids=str,
)
def test_grids_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffineGrid(**{"dtype": torch.int8, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(4, 6, dtype=torch.int32)}, "x.dtype: torch.int32 is not taken; write"),
        ({"scale_dtype": torch.int8}, "scale_dtype: torch.int8 is not taken"),
        ({"zero_point_dtype": torch.float32}, "zero_point_dtype: torch.float32 is not taken"),
        ({"eps": 0.0}, "eps: 0.0 is 0 in torch.float32; write 1.4e-45 or more"),
        ({"x": X.half(), "eps": 1e-9}, "eps: 1e-09 is 0 in torch.float16; write 5.96e-08"),
        (
            {"grid": AffineGrid(dtype=torch.uint8), "zero_point_dtype": torch.int8},
            "zero_point_dtype: torch.int8 lacks some of 0 to 255; write int32",
        ),
    ],
    ids=str,
)
def test_other_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_qparams_affine(**{"x": X, "block_size": (1, 6), "grid": INT8, **arguments})  # type: ignore[arg-type]


def test_qparams_of_another_shape_or_domain_are_refused() -> None:
    codes = X.to(torch.int8)
    of_rows = AffineQparams(torch.ones(4), SCALES.zero_point)
    with pytest.raises(ValueError, match=r"qparams.scale: .* \(4,\); write one entry per block"):
        quantize_affine(X, (1, 6), of_rows, INT8)
    turned = AffineQparams(SCALES.scale, torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"qparams.zero_point: has the shape \(1, 4\)"):
        dequantize_affine(codes, (1, 6), turned, INT8)
    with pytest.raises(ValueError, match=r"qparams.zero_point: write a tensor like the scale"):
        quantize_affine(X, (1, 6), AffineQparams(SCALES.scale, None), INT8)
    no_zero = AffineGrid(dtype=torch.int8, zero_point_domain="none")
    with pytest.raises(ValueError, match=r"qparams.zero_point: write None, .* 'none'"):
        dequantize_affine(codes, (1, 6), SCALES, no_zero)
    with pytest.raises(
        ValueError, match=r"codes.dtype: torch.uint8 is not taken; write torch.int8"
    ):
        dequantize_affine(codes.to(torch.uint8), (1, 6), SCALES, INT8)
    with pytest.raises(ValueError, match=r"output_dtype: torch.int32 is not taken"):
        dequantize_affine(codes, (1, 6), SCALES, INT8, output_dtype=torch.int32)
