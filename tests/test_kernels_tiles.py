"""Tiles of weights: what is packed comes back, by plain torch and by the kernels beside it."""

import pytest
import torch
from quantkernels.launches import Codes
from quantkernels.weight_only import reference
from quantkernels.weight_only.tiles import (
    grouping,
    pack_codes,
    pack_groups,
    unpack_codes,
    unpack_groups,
)

from tests.tiled import DEVICE, FORMS, HALVES, Form, codes_of, needs_triton, weight_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (128, 256), (5, 1000)])
def test_codes_come_back_from_tiles(kind: Codes, shape: tuple[int, int]) -> None:
    codes_OI = codes_of(kind, *shape)
    tiles = pack_codes(codes_OI, kind)
    assert tiles.shape[2:] == (128, 32) and tiles.is_contiguous()
    assert torch.equal(unpack_codes(tiles, kind, shape), codes_OI)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512, None])
@pytest.mark.parametrize("zero", [False, True])
def test_scales_come_back_from_tiles(size: int | None, zero: bool) -> None:
    for rows, groups in ((1, 1), (130, 3), (128, 4)):
        columns = groups * (size or 96)
        values_OG = torch.randn(rows, groups if size else 1)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values_OG = values_OG.to(dtype)
            packed = pack_groups(values_OG, columns, grouping(size, zero=zero))
            back_OG = unpack_groups(packed, (rows, columns), size)
            assert packed.dtype == dtype and torch.equal(back_OG, values_OG.float())


def test_a_word_holds_columns_that_are_32_apart() -> None:
    codes_OI = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 16)
    word = int(pack_codes(codes_OI, "int4")[0, 1, 0, 3]) & 0xFFFF
    nibbles = [(word >> 4 * part) & 15 for part in range(4)]
    assert nibbles == [int(codes_OI[0, 128 + 32 * part + 3]) + 8 for part in range(4)]


@needs_triton
@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (128, 512)])
def test_packed_tiles_are_the_references(kind: Codes, shape: tuple[int, int]) -> None:
    from quantkernels.weight_only import fused

    codes_OI = codes_of(kind, shape[0], shape[1] + 3).to(DEVICE)[:, 2:-1]
    assert torch.equal(fused.pack_codes(codes_OI, kind), pack_codes(codes_OI, kind))


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_dense_weight_is_the_references(form: Form, dtype: torch.dtype) -> None:
    from quantkernels.weight_only import fused

    size = form[1] or 1
    weight, _ = weight_of(*form, 130, 300 // size * size or size)
    ours, wanted = fused.dense(weight, dtype), reference.dense(weight, dtype)
    # an offset's product and sum are rounded once there, twice in float32 and then here
    slack = torch.finfo(dtype).eps if form[2] == "offset" else 0.0
    assert torch.allclose(ours.float(), wanted.float(), rtol=slack, atol=0)
