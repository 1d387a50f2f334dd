"""What a format must be able to do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams
from quantcore.schemes import FloatGrid, Scheme


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    codes_OI: Tensor  # int8; of float8, its bits
    qparams: Qparams
    scheme: Scheme
    input_scale: float | None = None  # of a static scheme
    input_factor_I: Tensor | None = None  # float32: inputs are divided by it first
    scale_dtype: torch.dtype = torch.float32  # the narrowest that holds all its scales

    def stored_codes(self) -> Tensor:
        """Codes in the dtype that says what they are."""
        grid = self.scheme.grid
        return self.codes_OI.view(grid.dtype) if isinstance(grid, FloatGrid) else self.codes_OI

    def stored_scale(self, dtype: torch.dtype) -> Tensor:
        """(O, G), or (1,) where all rows share one."""
        scale_OG = self.qparams.scale_OG.to(dtype)
        return scale_OG[0] if self.scheme.per_tensor else scale_OG


def scale_of_rows(stored: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """float32 (O, G) of what `stored_scale` gave."""
    scale = stored.float()
    return scale.reshape(1, 1).expand(rows, 1) if scheme.per_tensor else scale


def int8_codes(stored: Tensor) -> Tensor:
    """int8 of what `stored_codes` gave."""
    return stored.view(torch.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    # why a linear of this class under this scheme cannot be stored; None if it can
    refusal: Callable[[str, Scheme], str | None]
    # why it cannot have so many outputs and inputs; None if it can
    shape_refusal: Callable[[Scheme, int, int], str | None]
    # why these schemes cannot stand in one artifact; None if they can
    refusal_together: Callable[[frozenset[Scheme]], str | None]
    # names of linears that engines load as one matrix: all under one scheme, or all skipped
    fused: tuple[frozenset[str], ...]
    # whether a linear's inputs may be divided by a factor of their own
    input_factors: bool
    # whether the output head may be quantized
    output_head: bool
    # scales and zero points as they can be stored, given the dtype of the model's own weights
    storable: Callable[[Qparams, Scheme, torch.dtype], Qparams]
    # of one weight as stored
    code_bits: Callable[[Scheme], int]
    # of a linear with so many outputs and inputs: beside codes, scales and zero points of its own
    other_bytes: Callable[[Scheme, int, int], int]
    # tensors by their name after the module's, scales in the dtype given
    encode: Callable[[QuantizedLinear, torch.dtype], dict[str, Tensor]]
    # what `encode` was given, scales as stored, from the tensors and in_features
    read: Callable[[Mapping[str, Tensor], Scheme, int], QuantizedLinear]
    # the weight that an engine would compute with, from the stored bytes and in_features: float32
    decode: Callable[[Mapping[str, Tensor], Scheme, int], Tensor]
    # config.json's quantization_config for the linears with a scheme and those without
    config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]
    quant_method: str  # by which that section is known
    # the scheme of each quantized linear, from that section, the names of all linears and those of
    # all tensors; raises KeyError, TypeError or ValueError where it is damaged or tells of what we
    # cannot read
    schemes_of: Callable[[Mapping[str, Any], Iterable[str], Iterable[str]], dict[str, Scheme]]
    # whether such a section is this format's, of several known by one quant_method
    owns: Callable[[Mapping[str, Any]], bool] = lambda config: True
