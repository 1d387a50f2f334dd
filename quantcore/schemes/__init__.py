"""The schemes a job can name, as a table: a new one is a file and a row here."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quantcore.schemes import float8, int4, int8, int8_dynamic_int4
from quantcore.schemes.kind import (
    Activations,
    FloatGrid,
    Grid,
    IntegerGrid,
    SchemeKind,
    Span,
    ZeroPoint,
)

SCHEME_KINDS: dict[str, SchemeKind] = {
    "int4": int4.KIND,
    "int8": int8.WEIGHT_ONLY,
    "int8_dynamic": int8.DYNAMIC,
    "int8_static": int8.STATIC,
    "int8_dynamic_int4": int8_dynamic_int4.KIND,
    "float8": float8.WEIGHT_ONLY,
    "float8_dynamic": float8.DYNAMIC,
    "float8_static": float8.STATIC,
}

__all__ = [
    "SCHEME_KINDS",
    "Activations",
    "FloatGrid",
    "Grid",
    "IntegerGrid",
    "Scheme",
    "SchemeKind",
    "Span",
    "ZeroPoint",
    "dividing_group_sizes",
    "every_form",
    "resolve_scheme",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One linear's grid: which codes, which weights share a scale, and what zero is."""

    name: str
    group_size: int | None = None  # inputs that share a scale; None: the whole row, or more
    zero_point: ZeroPoint = "none"
    per_tensor: bool = False  # one scale for all rows

    @property
    def kind(self) -> SchemeKind:
        return SCHEME_KINDS[self.name]

    @property
    def grid(self) -> Grid:
        return self.kind.weights

    @property
    def activations(self) -> Activations | None:
        return self.kind.activations

    @property
    def static(self) -> bool:
        """Whether activations have a scale that calibration finds."""
        return self.kind.activations is not None and self.kind.activations.static

    @property
    def bits(self) -> int:
        return self.kind.weights.bits

    @property
    def symmetric(self) -> bool:
        return self.zero_point == "none"

    @property
    def searchable(self) -> bool:
        """Whether a narrower range could round finer: see `affine.search_qparams`."""
        return isinstance(self.grid, IntegerGrid) and not self.per_tensor

    @property
    def span(self) -> Span:
        if self.per_tensor:
            return "tensor"
        return "channel" if self.group_size is None else "group"

    def groups_of(self, in_features: int) -> int:
        """How many scales one row of `in_features` weights has."""
        if self.group_size is None:
            return 1
        assert in_features % self.group_size == 0
        return in_features // self.group_size

    def label(self) -> str:
        """In a report: int4 asym g64."""
        span = f"g{self.group_size}" if self.group_size else self.span
        if isinstance(self.grid, FloatGrid):
            return f"{self.name} {span}"
        return f"{self.name} {_ZERO_WORDS[self.zero_point]} {span}"


_ZERO_WORDS: dict[ZeroPoint, str] = {"none": "sym", "int": "asym", "float": "float-zero"}


def resolve_scheme(
    name: str,
    group_size: int | str | None = None,
    symmetric: bool = True,
    zero_point: Literal["int", "float"] | None = None,
) -> Scheme:
    """Fill in what a scheme is without being told; ValueError where its kind has no such form."""
    kind = SCHEME_KINDS[name]
    size = kind.usual_span if group_size is None else group_size
    span = "group" if isinstance(size, int) else size
    if span not in kind.spans:
        words = {"group": "a number", "channel": "channel", "tensor": "tensor"}
        known = " or ".join(words[span] for span in kind.spans)
        raise ValueError(f"{name} has no scale per {span}: write group_size: {known}")
    if symmetric and zero_point is not None:
        raise ValueError("a symmetric grid has no zero point: write symmetric: false, or drop it")
    zero: ZeroPoint = "none" if symmetric else zero_point or "int"
    if zero not in kind.zero_points:
        if kind.zero_points == ("none",):
            raise ValueError(f"{name} is symmetric: write symmetric: true")
        raise ValueError(f"{name} has no {zero} zero points: write symmetric: true")
    return Scheme(
        name=name,
        group_size=size if isinstance(size, int) else None,
        zero_point=zero,
        per_tensor=span == "tensor",
    )


def every_form(name: str, group_sizes: Iterable[int]) -> list[Scheme]:
    """All that a scheme's kind allows, with these group sizes."""
    kind = SCHEME_KINDS[name]
    groups: list[int | None] = [None] if "channel" in kind.spans else []
    groups += list(group_sizes) if "group" in kind.spans else []
    forms = [
        Scheme(name=name, group_size=size, zero_point=zero)
        for size in groups
        for zero in kind.zero_points
    ]
    if "tensor" in kind.spans:
        forms += [Scheme(name=name, zero_point=z, per_tensor=True) for z in kind.zero_points]
    return forms


def dividing_group_sizes(in_features: int) -> list[int]:
    """The usual group sizes that divide a row, for messages that say what to write instead."""
    return [size for size in (32, 64, 96, 128, 192, 256) if in_features % size == 0]
