"""What a format must be able to do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams
from quantcore.schemes import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    codes_OI: Tensor  # int8
    qparams: Qparams
    scheme: Scheme
    input_scale: float | None = None  # of a static scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    # why a linear of this class under this scheme cannot be stored; None if it can
    refusal: Callable[[str, Scheme], str | None]
    # why these schemes cannot stand in one artifact; None if they can
    refusal_together: Callable[[frozenset[Scheme]], str | None]
    # names of linears that engines load as one matrix: all under one scheme, or all skipped
    fused: tuple[frozenset[str], ...]
    # tensors by their name after the module's, scales in the dtype given
    encode: Callable[[QuantizedLinear, torch.dtype], dict[str, Tensor]]
    # the weight that an engine would compute with: float32 values of the stored bytes
    decode: Callable[[Mapping[str, Tensor], Scheme], Tensor]
    suffixes: Callable[[Scheme], tuple[str, ...]]
    # config.json's quantization_config for the linears with a scheme and those without
    config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]
