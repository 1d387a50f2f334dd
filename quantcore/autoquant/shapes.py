"""A candidate's weight as it would lie, by shapes alone: its bytes, and what compilers know of it.

Scales are in the weight's dtype, as artifacts and `quantize_` keep them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantcore.affine import Qparams
from quantcore.autoquant.candidates import Candidate
from quantcore.formats.base import QuantizedLinear
from quantcore.tensors import QuantizedTensor
from quantcore.tensors.layouts import Layout
from quantcore.tensors.packing import PACKINGS, plain

_INPUT_SCALE_BYTES = 4


def weight_of(candidate: Candidate, rows: int, columns: int, dtype: str) -> Tensor:
    """On the meta device. Layouts that only some devices pack are packed here, too."""
    kind, scheme = getattr(torch, dtype), candidate.scheme
    if scheme is None:
        return torch.empty(rows, columns, dtype=kind, device="meta")
    codes_OI = torch.empty(rows, columns, dtype=torch.int8, device="meta")
    scale_OG = torch.empty(rows, scheme.groups_of(columns), device="meta")
    zero_OG = scale_OG if scheme.zero_point == "float" else scale_OG.to(torch.int8)
    static = 1.0 if scheme.static else None
    linear = QuantizedLinear(codes_OI, Qparams(scale_OG, zero_OG), scheme, static, None, kind)
    weight = plain(linear, kind)
    kept = {name: part for name, part in weight.parts().items() if name.startswith("input_")}
    inner = PACKINGS[candidate.layout].pack(weight) | kept
    return QuantizedTensor(inner, replace(weight.facts, layout=candidate.layout))


def bytes_of(candidate: Candidate, rows: int, columns: int, dtype: str) -> int:
    """Of its weight, as `weight_of` has it.

    What a CPU takes comes by arithmetic: an operator on the meta device imports torch's compiler,
    which takes as long as a plan from known times does.
    """
    item, scheme = getattr(torch, dtype).itemsize, candidate.scheme
    if scheme is None:
        return int(rows * columns * item)
    groups = rows * scheme.groups_of(columns)
    if candidate.layout == Layout.PLAIN:
        zero = {"none": 0, "int": 1, "float": item}[scheme.zero_point]
        codes = rows * -(-columns * scheme.bits // 8)
        return int(codes + groups * (item + zero) + scheme.static * _INPUT_SCALE_BYTES)
    if candidate.layout == Layout.INT4_CPU:  # scales and zero points in pairs
        return int(rows * columns // 2 + groups * 2 * item)
    return num_bytes(weight_of(candidate, rows, columns, dtype))


def num_bytes(weight: Tensor) -> int:
    return weight.num_bytes() if isinstance(weight, QuantizedTensor) else weight.nbytes
