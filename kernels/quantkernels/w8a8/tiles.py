"""How a weight lies for products with inputs in 8 bits, and the way there and back in plain torch.

8-bit codes lie row by row, or in tiles; 4-bit ones in tiles. A tile is 128 rows by 128 columns: 128
bytes a row of 8-bit codes, or 64 of 4-bit ones, where the low half of byte i is column i and the
high half column 64 + i. Tiles are contiguous, and those of 128 rows follow one another.

    codes   int8 (row blocks, pieces, 128, 128 or 64); row by row (rows, columns)
    scale   (rows,) of whole rows, in any floating dtype; float32 (row blocks, groups, 128) of
            groups of 32, 64 or 128 columns, longer ones written again for every 128
    sums    float32 (rows,), where inputs may have a zero point: the weight's values summed by rows

Rows and columns are padded to multiples of 128, groups' scales to multiples of 256 columns as in
weight_only; inputs there count as nothing.

Shape suffixes: O = out_features, I = in_features, R = row blocks, P = pieces, B = 128 rows of a
block, C = bytes of a row of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkernels.launches import Codes
from quantkernels.weight_only.tiles import ROWS, pack_groups, unpack_groups

COLUMNS = 128
HALF = COLUMNS // 2

__all__ = ["ROWS", "Tiles8", "pack_codes", "pack_groups", "unpack_codes", "unpack_groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles8:
    codes: Tensor
    scale: Tensor
    sums_O: Tensor | None
    kind: Codes
    group: int  # columns, at most 128; 0 where a row has one scale
    features: tuple[int, int]  # (O, I)

    @property
    def tiled(self) -> bool:
        return self.codes.dim() == 4


def pack_codes(codes_OI: Tensor, kind: Codes) -> Tensor:
    """(R, P, B, C) of int8 codes: whole numbers, or the bits of float8."""
    rows, columns = codes_OI.shape
    wide = codes_OI.new_zeros(-(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS)
    wide[:rows, :columns] = codes_OI
    tiles = wide.reshape(-1, ROWS, wide.shape[1] // COLUMNS, COLUMNS).transpose(1, 2)
    if kind == "int4":
        low, high = tiles[..., :HALF].int() & 15, tiles[..., HALF:].int() & 15
        both = low | (high << 4)
        tiles = torch.where(both > 127, both - 256, both).to(torch.int8)
    return tiles.contiguous()


def unpack_codes(codes_RPBC: Tensor, kind: Codes, features: tuple[int, int]) -> Tensor:
    """What `pack_codes` was given."""
    tiles = codes_RPBC.view(torch.int8)
    if kind == "int4":
        wide = codes_RPBC.int()
        tiles = torch.cat([(wide << 28) >> 28, wide >> 4], dim=-1).to(torch.int8)
    codes_OI = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    return codes_OI[: features[0], : features[1]].contiguous()
