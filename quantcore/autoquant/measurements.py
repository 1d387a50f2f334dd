"""What was timed, on which kind of hardware: JSON that is merged and never timed twice.

    {"version": 1, "hardware": [
    {"kind": {"device": "cuda", "name": "NVIDIA H200", ...}, "measurements": [
    {"candidate": "dense", "dtype": "bfloat16", "rows": 4096, "columns": 4096, "tokens": 1, ...},
    ...
    ]}
    ]}

One measurement a line, sorted, so that a diff shows what was added. Times of another kind of
hardware, or of other software on it, are kept but never used: `of_kind` names them. So are entries
of candidates that this version does not know, which `parse` leaves out.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from quantkernels.launches import VERSIONS

from quantcore.autoquant.candidates import Candidate, candidate_of
from quantcore.errors import DAMAGE, StoreError, why_damaged

VERSION = 1
# What a time hangs on: every kernel of ours, one of another version may be faster; which launch is
# taken; how inputs are rounded; how replays are timed, 2 without a pause. None is ours on a CPU
_OF_TIMES = [*VERSIONS.items(), ("choice", 4), ("rounding", 3), ("clock", 2)]
KERNELS = " ".join(f"{name}:{version}" for name, version in sorted(_OF_TIMES))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HardwareKind:
    """On equal kinds a product is expected to take equal time."""

    device: str  # as torch names it
    name: str
    driver: str = ""  # none on a CPU
    torch: str
    triton: str = ""
    kernels: str  # versions of our own: KERNELS
    threads: int = 0  # of a CPU
    instructions: str = ""  # of a CPU: those that torch's kernels were chosen by

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not one.type:
                raise ValueError(f"{one.name}: {value!r} is not {_WORDS[one.type]}")
        if not self.device or not self.name:
            raise ValueError("device, name: a kind of hardware has both")

    @classmethod
    def of(cls, kind: Mapping[str, str], kernels: str = KERNELS, threads: int = 0) -> Self:
        """From what a worker says of itself."""
        # torch's version is a kind of text of its own
        named = {name: str(kind[name]) for name in ("device", "name", "torch")}
        told = {name: str(kind.get(name) or "") for name in ("driver", "triton")}
        if kind["device"] == "cpu":  # a GPU's follow from its name
            told["instructions"] = str(kind.get("instructions") or "")
        return cls(**named, **told, kernels=kernels, threads=threads)

    def label(self) -> str:
        parts = [self.full_name()]
        parts += [f"driver {self.driver}"] if self.driver else []
        parts += [f"torch {self.torch}"]
        parts += [f"triton {self.triton}"] if self.triton else []
        parts += [f"kernels {self.kernels}"]
        parts += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(parts)

    def full_name(self) -> str:
        """Of the hardware alone: CPUs of one name may have other instructions."""
        return f"{self.name} {self.instructions}".strip()


_WORDS: Mapping[Any, str] = {str: "text", int: "a whole number"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is timed: `tokens` rows of inputs of `dtype` by a weight of (rows, columns)."""

    candidate: Candidate
    dtype: str
    rows: int
    columns: int
    tokens: int

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns, self.tokens)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"rows, columns, tokens: {sizes} are not all whole and 1 or more")
        if type(self.dtype) is not str or not self.dtype:
            raise ValueError(f"dtype: {self.dtype!r} is not a dtype's name")

    def sort_key(self) -> tuple[int, int, str, int, str]:
        return self.rows, self.columns, self.dtype, self.tokens, self.candidate.label()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    median_us: float
    low_us: float  # confidence interval of the median
    high_us: float
    repeats: int
    stopped_early: bool = False  # it had lost: its time is known to be more, not how much

    def __post_init__(self) -> None:
        times = (self.low_us, self.median_us, self.high_us)
        if any(type(time) not in (int, float) or not math.isfinite(time) for time in times):
            raise ValueError(f"low_us, median_us, high_us: {times} are not all finite numbers")
        if not 0 < self.low_us <= self.median_us <= self.high_us:
            raise ValueError(f"low_us, median_us, high_us: {times} do not rise from above 0")
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats!r} is not a whole number from 1")
        if type(self.stopped_early) is not bool:
            raise ValueError(f"stopped_early: {self.stopped_early!r} is neither true nor false")

    def knowledge(self) -> tuple[bool, float, int, float, float, float]:
        """Of two timings of one product, the greater is the better known: a total order."""
        spread = (self.high_us - self.low_us) / self.median_us
        times = (-self.median_us, -self.low_us, -self.high_us)
        return not self.stopped_early, -spread, self.repeats, *times


Timings = Mapping[Product, Timing]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    of: Mapping[HardwareKind, Timings]
    ignored: tuple[str, ...] = field(default=(), compare=False)  # what could not be used, and why

    def of_kind(self, kind: HardwareKind) -> tuple[dict[Product, Timing], list[str]]:
        """What may be used on this kind, and a line for all that may not."""
        lines = list(self.ignored)
        for other, timings in sorted(self.of.items()):
            if other != kind:
                differ = ", ".join(
                    f"{one.name} {getattr(other, one.name) or 'none'!s} and not "
                    f"{getattr(kind, one.name) or 'none'!s}"
                    for one in fields(HardwareKind)
                    if getattr(other, one.name) != getattr(kind, one.name)
                )
                lines.append(f"times of another kind are ignored ({len(timings)}): {differ}")
        return dict(self.of.get(kind, {})), lines


def merged(many: Iterable[Measurements]) -> Measurements:
    """All that any of them has; of what several have, the better known. Their order is all one."""
    together: dict[HardwareKind, dict[Product, Timing]] = {}
    ignored: dict[str, None] = {}
    for one in many:
        ignored |= dict.fromkeys(one.ignored)
        for kind, timings in one.of.items():
            known = together.setdefault(kind, {})
            for product, timing in timings.items():
                known[product] = max(known.get(product, timing), timing, key=Timing.knowledge)
    return Measurements(of=together, ignored=tuple(sorted(ignored)))


def written(measurements: Measurements) -> str:
    kinds = [
        f'{{"kind": {json.dumps(asdict(kind))}, "measurements": [\n'
        + ",\n".join(
            json.dumps(_line(product, timings[product]), allow_nan=False)
            for product in sorted(timings, key=Product.sort_key)
        )
        + "\n]}"
        for kind, timings in sorted(measurements.of.items())
    ]
    return f'{{"version": {VERSION}, "hardware": [\n' + ",\n".join(kinds) + "\n]}\n"


def parse(text: str) -> Measurements:
    """What `written` gave. Raises StoreError where the text is damaged or of another version."""
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise StoreError(
                f"measurements: version {document['version']} where this reads {VERSION}: "
                "delete them, or run the version that wrote them"
            )
        of: dict[HardwareKind, dict[Product, Timing]] = {}
        ignored: list[str] = []
        for entry in document["hardware"]:
            timings = of.setdefault(HardwareKind(**entry["kind"]), {})
            for line in entry["measurements"]:
                read = _read_line(line)
                if isinstance(read, str):
                    ignored.append(read)
                    continue
                product, timing = read
                if product in timings:
                    raise ValueError(f"'{product.candidate.label()}' stands twice: {line}")
                timings[product] = timing
    except DAMAGE as error:
        why = why_damaged(error)
        raise StoreError(f"measurements: damaged ({why}): delete them to have them anew") from None
    return Measurements(of=of, ignored=tuple(ignored))


_PRODUCT = ("candidate", "dtype", "rows", "columns", "tokens")


def _line(product: Product, timing: Timing) -> dict[str, Any]:
    facts = {name: getattr(product, name) for name in _PRODUCT[1:]}
    return {"candidate": product.candidate.label(), **facts, **asdict(timing)}


def _read_line(line: Mapping[str, Any]) -> tuple[Product, Timing] | str:
    label = line["candidate"]
    if not isinstance(label, str):
        raise ValueError(f"candidate: {label!r} is not a label")
    try:
        candidate = candidate_of(label)
    except ValueError as error:
        return f"a measurement is ignored: {error}"
    facts = {name: line[name] for name in _PRODUCT[1:]}
    rest = {name: value for name, value in line.items() if name not in _PRODUCT}
    return Product(candidate=candidate, **facts), Timing(**rest)
