"""What a scheme's name fixes. The job file chooses the rest within it."""

from dataclasses import dataclass
from typing import Literal

import torch

# A linear's weights share a scale by groups of inputs, by output channels, or all of them
Span = Literal["group", "channel", "tensor"]

# What zero is: nothing of its own (a symmetric grid), a code, (q - z) * s, or a value, q * s + z
ZeroPoint = Literal["none", "int", "float"]


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Whole codes, signed: from -2**(bits-1) to 2**(bits-1)-1."""

    bits: int

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The finite values of a small floating-point type; a scale carries max|w| to the largest."""

    dtype: torch.dtype
    bits: int

    @property
    def lowest(self) -> int:
        return -self.highest

    @property
    def highest(self) -> int:
        return int(torch.finfo(self.dtype).max)


FLOAT8 = FloatGrid(torch.float8_e4m3fn, 8)  # Micikevicius et al. 2022, arXiv:2209.05433, section 3

Grid = IntegerGrid | FloatGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """How inputs are rounded while a model serves."""

    grid: Grid
    static: bool = False  # one scale for all, found in calibration; else found while serving
    symmetric: bool = True  # else with an integer zero point


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeKind:
    weights: Grid
    activations: Activations | None  # None: weight-only
    usual_span: int | Literal["channel", "tensor"]  # without a group_size in the job file
    spans: tuple[Span, ...]
    zero_points: tuple[ZeroPoint, ...] = ("none",)
    summary: str
