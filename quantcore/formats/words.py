"""Integer codes packed into 32-bit words, as the field's formats have them.

A word holds 32 / bits neighbours of a row, the first one lowest, each raised by half of the range:
the layout of compressed-tensors' `pack_to_int32`, without an int32 for every code on the way. Bytes
become words as they lie in memory, which is little-endian wherever torch runs.
"""

import torch
from torch import Tensor


def pack_words(codes_RC: Tensor, bits: int) -> Tensor:
    """Signed codes (int8) of 4 or 8 bits as int32, (R, ceil(C * bits / 32)), zeros after them."""
    assert bits in {4, 8} and codes_RC.dtype == torch.int8
    raised_RC = (codes_RC + (1 << (bits - 1))).view(torch.uint8)  # int8 wraps as the byte should
    padding = -codes_RC.shape[1] % (32 // bits)
    if padding:
        raised_RC = torch.nn.functional.pad(raised_RC, (0, padding))
    if bits == 4:
        raised_RC = raised_RC[:, ::2] | raised_RC[:, 1::2] << 4
    return raised_RC.contiguous().view(torch.int32)
