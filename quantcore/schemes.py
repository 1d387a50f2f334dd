"""The schemes a job can name, as a table: a new one is a row, and a format that carries it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeKind:
    """What a scheme's name fixes; the job file chooses the rest within it."""

    bits: int  # per weight
    activation_bits: int | None  # None: weight-only; else activations are quantized while serving
    default_group_size: int | None  # None: one scale per output channel
    groups: bool  # may a row be cut into groups?
    asymmetric: bool  # may a scale come with a zero point?
    summary: str
    static: bool = False  # activations by one scale, found in calibration; else one per token


SCHEME_KINDS: dict[str, SchemeKind] = {
    "int4": SchemeKind(
        bits=4,
        activation_bits=None,
        default_group_size=128,
        groups=True,
        asymmetric=True,
        summary="4-bit weights, activations untouched (W4A16)",
    ),
    "int8": SchemeKind(
        bits=8,
        activation_bits=None,
        default_group_size=None,
        groups=True,
        asymmetric=True,
        summary="8-bit weights, activations untouched (W8A16)",
    ),
    "int8_dynamic": SchemeKind(
        bits=8,
        activation_bits=8,
        default_group_size=None,
        groups=False,
        asymmetric=False,
        summary="8-bit weights per channel, activations to 8 bits per token while serving (W8A8)",
    ),
    "int8_static": SchemeKind(
        bits=8,
        activation_bits=8,
        default_group_size=None,
        groups=False,
        asymmetric=False,
        summary="8-bit weights per channel, activations to 8 bits by one calibrated scale (W8A8)",
        static=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One linear's grid: integer codes, a scale per group or per output channel, a zero point."""

    name: str
    group_size: int | None  # inputs that share a scale; None: the whole row
    symmetric: bool

    @property
    def kind(self) -> SchemeKind:
        return SCHEME_KINDS[self.name]

    @property
    def bits(self) -> int:
        return self.kind.bits

    def groups_of(self, in_features: int) -> int:
        """How many scales one row of `in_features` weights has."""
        if self.group_size is None:
            return 1
        assert in_features % self.group_size == 0
        return in_features // self.group_size

    def label(self) -> str:
        span = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.name} {'sym' if self.symmetric else 'asym'} {span}"


def dividing_group_sizes(in_features: int) -> list[int]:
    """The usual group sizes that divide a row, for messages that say what to write instead."""
    return [size for size in (32, 64, 96, 128, 192, 256) if in_features % size == 0]
