"""Codes of 4 bits, two to a byte: two's-complement nibbles, the even column low.

Shape suffixes: O = out_features, I = in_features.
"""

import torch
from torch import Tensor


def packed_nibbles(codes_OI: Tensor) -> Tensor:
    """uint8 (O, ceil(I / 2)) of int8 codes from -8 to 7."""
    nibbles_OI = torch.nn.functional.pad(codes_OI, (0, codes_OI.shape[1] % 2)).to(torch.uint8) & 15
    return nibbles_OI[:, ::2] | (nibbles_OI[:, 1::2] << 4)


def unpacked_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """int8 (O, I)."""
    nibbles_OI = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :in_features]
    return (nibbles_OI.to(torch.int8) ^ 8) - 8
