"""How a weight lies for the weight-only kernels, and the way there and back in plain torch.

A tile is 128 rows by a piece of a row: 32 words of 16 bits, each with four codes of 4 bits or two
of 8. Part p of word i (its bits from p * bits on) is column 32 p + i of the piece, so that a load's
words, unpacked, are runs of 32 columns that share a scale. A tile is contiguous, and the tiles of
128 rows follow one another, so that a program reads whole lines and nothing else.

    codes   int16 (row blocks, pieces, 128, 32)
    scale   of groups of 32, 64 or 128 columns; longer ones are written again for every 128.
            float32 (row blocks, groups, 128), or in 16 bits (row blocks, groups / 2, 128, 2): two
            groups of a row side by side, for four bytes are the least that a GPU copies on its own.
            Of whole rows: (rows,), to the padded height
    zero    like scale, in groups

Scales and zero points in bfloat16 or float16 are kept so, all others in float32.

Rows are padded to multiples of 128 and columns to multiples of 256; inputs there count as nothing.

Shape suffixes: O = out_features, I = in_features, G = groups per row, R = row blocks, P = pieces,
B = 128 rows of a block, W = 32 words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkernels.grids import GridName
from quantkernels.launches import BITS, Codes

ROWS = 128  # of a tile
WORDS = 32  # of 16 bits, in a tile's row
COLUMNS = 256  # to whose multiples rows are padded
LONGEST = 128  # group; 32 and 64 are the others
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    codes_RPBW: Tensor
    scale: Tensor
    zero: Tensor | None
    kind: Codes
    grid: GridName  # how codes and scale, and zero where there is one, make values
    group: int  # columns, at most 128; 0 where a row has one scale, and no zero
    features: tuple[int, int]  # (O, I)

    @property
    def device(self) -> torch.device:
        return self.codes_RPBW.device


def grouping(size: int | None, *, zero: bool) -> int:
    """`Tiles.group` of groups of `size`, None for whole rows."""
    if size is None:
        return LONGEST if zero else 0
    return min(size, LONGEST)


def program_rows(rows: int, wanted: int) -> int:
    """Of a program: those wanted, or a tile's where so many would pass the last tile."""
    return wanted if _up(rows, ROWS) % wanted == 0 else ROWS


def pack_codes(codes_OI: Tensor, kind: Codes) -> Tensor:
    """(R, P, B, W) of int8 codes: whole numbers, or the bits of float8."""
    bits = BITS[kind]
    rows, columns = codes_OI.shape
    wide = codes_OI.new_zeros(_up(rows, ROWS), _up(columns, COLUMNS), dtype=torch.int32)
    wide[:rows, :columns] = codes_OI.to(torch.int32) + (8 if kind == "int4" else 0)
    parts_RBPpW = (wide & ((1 << bits) - 1)).reshape(
        -1, ROWS, wide.shape[1] * bits // (16 * WORDS), 16 // bits, WORDS
    )
    words = torch.zeros_like(parts_RBPpW[:, :, :, 0])
    for part in range(16 // bits):
        words |= parts_RBPpW[:, :, :, part] << (bits * part)
    signed = torch.where(words > 0x7FFF, words - 0x10000, words)
    return signed.to(torch.int16).transpose(1, 2).contiguous()


def unpack_codes(codes_RPBW: Tensor, kind: Codes, features: tuple[int, int]) -> Tensor:
    """What `pack_codes` was given."""
    bits = BITS[kind]
    words = codes_RPBW.transpose(1, 2).to(torch.int32)
    parts = [(words >> (bits * part)) & ((1 << bits) - 1) for part in range(16 // bits)]
    codes_OI = torch.stack(parts, dim=3).flatten(2).flatten(0, 1)[: features[0], : features[1]]
    if kind == "int4":
        return (codes_OI - 8).to(torch.int8)
    return torch.where(codes_OI > 127, codes_OI - 256, codes_OI).to(torch.int8)


def pack_groups(values_OG: Tensor, columns: int, group: int) -> Tensor:
    """Scales or zero points of each group, or (O, 1) of each row; `group` is `Tiles.group`."""
    rows = values_OG.shape[0]
    dtype = values_OG.dtype if values_OG.dtype in HALVES else torch.float32
    if group == 0:
        values = values_OG.new_zeros(_up(rows, ROWS), dtype=dtype)
        values[:rows] = values_OG[:, 0]
        return values
    wide = values_OG.new_zeros(_up(rows, ROWS), _up(columns, COLUMNS) // group, dtype=dtype)
    there = -(-columns // group)
    apart = -(-there // values_OG.shape[1])  # groups here to one there
    wide[:rows, :there] = values_OG.to(dtype).repeat_interleave(apart, dim=1)[:, :there]
    if dtype in HALVES:
        return wide.reshape(-1, ROWS, wide.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return wide.reshape(-1, ROWS, wide.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, features: tuple[int, int], size: int | None) -> Tensor:
    """What `pack_groups` was given, float32 (O, G), of groups of `size` or whole rows."""
    rows, columns = features
    packed = packed.float()
    if packed.dim() == 1:
        return packed[:rows, None]
    values_OG = packed.transpose(1, 2).flatten(0, 1).flatten(1)[:rows]
    group = _up(columns, COLUMNS) // values_OG.shape[1]
    apart = max(1, (size or columns) // group) if size else values_OG.shape[1]
    count = -(-columns // size) if size else 1
    return values_OG[:, ::apart][:, :count].contiguous()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
