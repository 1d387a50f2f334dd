"""Layouts: what may lie in which, and that a weight reads back the same from all of them."""

import pytest
import torch

from quantcore.errors import QuantizationError
from quantcore.schemes import SCHEME_KINDS, Scheme, ZeroPoint, every_form
from quantcore.tensors import LAYOUTS, Layout, QuantizedTensor, pruned_24, relayout
from tests.quantized import FORMS, laid, layouts_of, linear

INT4 = Scheme(name="int4", group_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_every_layout_reads_back_the_same(scheme: Scheme, dtype: torch.dtype) -> None:
    for layout in layouts_of(scheme, dtype):
        ours = linear(scheme, 48, 96, factor=True, sparse=layout == Layout.SPARSE_24)
        plain = QuantizedTensor.of(ours, dtype)
        there = relayout(plain, layout)
        codes_OI, qparams = there.read()
        assert torch.equal(codes_OI, ours.codes_OI)
        assert torch.equal(qparams.scale_OG, ours.qparams.scale_OG)
        assert torch.equal(there.dequantize(), plain.dequantize())
        back = relayout(there, Layout.PLAIN)
        assert torch.equal(back.codes.view(torch.uint8), plain.codes.view(torch.uint8))
        assert back.facts == plain.facts


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
def test_our_tiles_keep_scales_and_zero_points_in_the_scales_dtype(
    zero_point: ZeroPoint, stored: torch.dtype
) -> None:
    scheme = Scheme(name="int4", group_size=64, zero_point=zero_point)
    plain = QuantizedTensor.of(linear(scheme, 128, 512, stored=stored), torch.bfloat16)
    there = relayout(plain, Layout.TRITON_TILED)
    kinds = 1 if there.zero is None else 2
    assert {part.dtype for part in (there.scale, there.zero) if part is not None} == {stored}
    assert there.num_bytes() == 128 * 512 // 2 + 128 * 8 * stored.itemsize * kinds
    back = relayout(there, Layout.PLAIN)
    for name, part in plain.parts().items():
        assert torch.equal(back.parts()[name], part) and back.parts()[name].dtype == part.dtype


def test_tiles_lie_as_tinygemm_reads_them() -> None:
    """Word by word, from the kernel's own indices: 8 rows and pairs of 16 columns to a tile."""
    for columns, depth in ((32, 2), (64, 4), (96, 2), (256, 8)):
        ours = linear(INT4, 16, columns)
        tiles = laid(ours, torch.bfloat16, Layout.TENSOR_CORE_TILED).codes
        assert tiles.shape == (2, columns // (16 * depth), 32, depth // 2)
        for tile, outer, lane, pair in ((0, 0, 0, 0), (1, 0, 31, depth // 2 - 1), (1, -1, 13, 0)):
            row = tile * 8 + lane // 4
            base = (outer % tiles.shape[1] * depth + pair * 2) * 16 + lane % 4 * 2
            columns_8 = [base + tile_ * 16 + half for tile_ in (0, 1) for half in (0, 1, 8, 9)]
            nibbles = [int(ours.codes_OI[row, column]) + 8 for column in columns_8]
            word = sum(nibbles[n] << 4 * at for at, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
            assert int(tiles[tile, outer, lane, pair]) & 0xFFFFFFFF == word


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
def test_the_legal_pairs_of_layout_and_zero_point(layout: Layout, zero_point: ZeroPoint) -> None:
    legal = {
        Layout.PLAIN: {"none", "int", "float"},
        Layout.TENSOR_CORE_TILED: {"none", "float"},
        Layout.TRITON_TILED: {"none", "int", "float"},
        Layout.INT4_CPU: {"none", "float"},
        Layout.INT4_DYNAMIC_CPU: {"none"},
        Layout.SPARSE_24: {"none"},
        Layout.SPARSE_24_CUDA: {"none"},
    }
    assert set(LAYOUTS[layout].zero_points) == legal[layout]
    name = (LAYOUTS[layout].schemes or ("int4",))[0]
    if zero_point not in SCHEME_KINDS[name].zero_points:
        return
    scheme = Scheme(name=name, group_size=32, zero_point=zero_point)
    dtype = torch.float32 if layout == Layout.INT4_DYNAMIC_CPU else torch.bfloat16
    weight = QuantizedTensor.of(linear(scheme, 32, 64, sparse=True), dtype)
    if layout == Layout.SPARSE_24_CUDA:
        with pytest.raises(QuantizationError, match="is of the cuda, not of cpu"):
            relayout(weight, layout)
    elif zero_point in legal[layout]:
        assert relayout(weight, layout).layout_name == layout
    else:
        with pytest.raises(QuantizationError, match=rf"'{layout}' .*write zero_point 'none'"):
            relayout(weight, layout)


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "dtype", "words"),
    [
        ("tensor_core_tiled", Scheme(name="int8"), (32, 64), torch.bfloat16, "holds int4"),
        ("tensor_core_tiled", INT4, (32, 64), torch.float32, "computes in bfloat16"),
        ("tensor_core_tiled", INT4, (12, 64), torch.bfloat16, "rows by 8"),
        ("int4_cpu", Scheme(name="int4"), (32, 64), torch.float32, "32, 64, 128, 256"),
        ("int4_cpu", Scheme(name="int4", group_size=16), (32, 64), torch.float32, "these group"),
        ("int4_cpu", INT4, (8, 64), torch.float32, "rows by 16"),
        ("int4_cpu", INT4, (32, 64), torch.float32, "computes in bfloat16"),
        (
            "int4_dynamic_cpu",
            Scheme(name="int8_dynamic_int4", group_size=16),
            (32, 64),
            torch.float32,
            "group_size 32",
        ),
        ("sparse_24", Scheme(name="int8"), (32, 60), torch.float32, "columns by 8"),
        ("sparse_24", Scheme(name="int8"), (32, 64), torch.float32, r"pruned_24\(weight\)"),
        ("sparse_24", INT4, (32, 64), torch.float32, "holds int8 or"),
    ],
)
def test_a_weight_that_cannot_lie_so_is_refused(
    layout: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, words: str
) -> None:
    weight = QuantizedTensor.of(linear(scheme, *shape), dtype)
    with pytest.raises(QuantizationError, match=f"layout '{layout}' .*{words}"):
        relayout(weight, layout)


def test_a_layout_with_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'marlin' is not a valid Layout"):
        relayout(QuantizedTensor.of(linear(INT4, 32, 64), torch.float32), "marlin")


def test_pruning_keeps_the_two_largest_of_four() -> None:
    w_OI = torch.tensor([[1.0, -3, 2, 0.5, 0, 0, 0, 7]])
    assert pruned_24(w_OI).tolist() == [[0, -3, 2, 0, 0, 0, 0, 7]]
    wide_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert ((pruned_24(wide_OI).reshape(64, -1, 4) != 0).sum(-1) == 2).all()


def test_sparse_codes_take_five_eighths() -> None:
    ours = linear(Scheme(name="int8"), 32, 64, sparse=True)
    sparse = laid(ours, torch.float32, Layout.SPARSE_24)
    assert sparse.places is not None
    assert sparse.codes.numel() + sparse.places.numel() == 32 * 64 * 5 // 8


def test_every_scheme_lies_plain() -> None:
    for name in SCHEME_KINDS:
        for scheme in every_form(name, [32]):
            assert Layout.PLAIN in layouts_of(scheme, torch.float64)
