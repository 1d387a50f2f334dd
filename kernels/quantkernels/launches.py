"""How a product's kernel may be launched, and what was found best for which shape: data.

They are JSON, one file a GPU (`tuned/NVIDIA_H200.json`), made by `python -m quantkernels.tune`. An
entry is the best launch for a kernel, codes, group, rows, columns and tokens, with what it and a
bfloat16 product took. Data of another version of a kernel are left aside with a warning, and so is
a file that is damaged or another GPU's. What is taken for a shape is chosen in `choice.py`.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args

Kernel = Literal["weight_only", "w8a8"]
Codes = Literal["int4", "int8", "float8"]

# raised whenever a launch that was tuned may no longer be the best, or be one
VERSIONS: dict[Kernel, int] = {"weight_only": 3, "w8a8": 1}
BITS: dict[Codes, int] = {"int4": 4, "int8": 8, "float8": 8}
INPUT_BYTES: dict[Kernel, int] = {"weight_only": 2, "w8a8": 1}
SHARED_BYTES = 227 << 10  # of a multiprocessor, at most
FOLDER_VARIABLE = "QUANTFLEET_TUNED"  # a folder whose files are read before those shipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    rows: int  # of a program: 32, 64, 128 or 256
    tokens: int  # of a program: 8 or more
    split: int  # spans of a row's columns
    turn: int  # columns that are loaded at once: 64 for 8-bit codes, 128 or 256
    stages: int
    warps: int
    early: bool = False  # weight_only: whether values are scaled, and not sums
    overlapped: bool = False  # by Hopper's own kernel, for many tokens
    other: bool = False  # by no kernel of ours: the rest has no meaning

    def __post_init__(self) -> None:
        good = (
            self.rows in (32, 64, 128, 256)
            and self.tokens in (8, 16, 32, 64, 128, 256)
            and 1 <= self.split <= 64
            and self.turn in (64, 128, 256)
            and 1 <= self.stages <= 8
            and self.warps in (1, 2, 4, 8, 16)
            and all(type(getattr(self, field.name)) is field.type for field in fields(self))
        )
        if good and self.overlapped:  # whole groups of four warps, by tiles of theirs
            good = self.rows >= 128 and self.tokens >= 32 and self.warps in (4, 8)
            good = good and self.stages > 1  # one place is let go of when the next is there
        if not good:
            raise ValueError(f"a launch that cannot be: {self}")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        return cls(**{field.name: document[field.name] for field in fields(cls)})


OTHER = Launch(rows=128, tokens=64, split=1, turn=128, stages=3, warps=8, other=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    kernel: Kernel
    codes: Codes
    group: int
    rows: int
    columns: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    shape: Shape
    launch: Launch
    time_us: float
    dense_us: float  # of the same product by a bfloat16 weight

    @property
    def ratio(self) -> float:
        """Above 1 it is faster than a bfloat16 weight."""
        return self.dense_us / self.time_us

    def document(self) -> dict[str, Any]:
        times = {"time_us": self.time_us, "dense_us": self.dense_us}
        return {**asdict(self.shape), "launch": asdict(self.launch), **times}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        shape = Shape(**{field.name: document[field.name] for field in fields(Shape)})
        if shape.kernel not in VERSIONS or shape.codes not in get_args(Codes):
            raise ValueError(f"no kernel {shape.kernel!r} for codes {shape.codes!r}")
        sizes = (shape.rows, shape.columns, shape.tokens)
        if shape.group not in (0, 32, 64, 128) or any(type(s) is not int or s < 1 for s in sizes):
            raise ValueError(f"a shape that cannot be: {shape}")
        launch = Launch.of(document["launch"])
        if not launch.other and shared_bytes(launch, shape) > SHARED_BYTES:
            raise ValueError(f"a launch that needs more memory than there is: {launch}")
        times = {name: float(document[name]) for name in ("time_us", "dense_us")}
        if not all(0 < time < math.inf for time in times.values()):
            raise ValueError(f"times that cannot be: {times}")
        return cls(shape=shape, launch=launch, **times)


def shared_bytes(launch: Launch, shape: Shape) -> int:
    """What a multiprocessor keeps of codes and inputs on their way, at most."""
    codes = launch.turn * launch.rows * BITS[shape.codes] // 8
    inputs = launch.turn * launch.tokens * INPUT_BYTES[shape.kernel]
    return (codes + inputs) * launch.stages


def narrow(launch: Launch, group: int) -> bool:
    """Whether a turn has one group, whose scale multiplies values before their product.

    With scales of 16 bits by twos, which half is its hangs on the turn, and Triton then moves the
    values through shared memory.
    """
    return launch.early and not (launch.overlapped or launch.other) and launch.turn <= group


def load(gpu: str) -> list[Tuned]:
    """What is known of a GPU, as shipped; before that, from the folder the environment names."""
    return _load(gpu, os.environ.get(FOLDER_VARIABLE, ""))


@cache
def _load(gpu: str, folder: str) -> list[Tuned]:
    name = file_name(gpu)
    places: list[Any] = [files("quantkernels") / "tuned" / name]
    if folder and not Path(folder).is_dir():
        _left_aside(folder, f"{FOLDER_VARIABLE} names what is no folder")
    elif folder:
        places.append(Path(folder) / name)
    found: dict[Shape, Tuned] = {}
    for place in places:
        try:
            entries = parse(place.read_text(), gpu, str(place)) if place.is_file() else []
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            missing = "nothing there is called " if isinstance(error, KeyError) else ""
            _left_aside(str(place), f"{missing}{error}")
        else:
            found |= {entry.shape: entry for entry in entries}
    return list(found.values())


def _left_aside(place: str, why: str) -> None:
    warnings.warn(
        f"tuned launches in {place} are left aside ({why}): make them anew with "
        "python -m quantkernels.tune",
        stacklevel=2,
    )


def parse(text: str, gpu: str, place: str) -> list[Tuned]:
    """What a file has of a GPU, without what is of other versions of kernels, told by a warning.

    Raises ValueError, KeyError, TypeError or AttributeError for data that are damaged.
    """
    document = json.loads(text)
    if document["gpu"] != gpu:
        raise ValueError(f"of {document['gpu']!r}, not of {gpu!r}")
    kernels, versions = [entry["kernel"] for entry in document["launches"]], document["versions"]
    old = [name for name in VERSIONS if versions.get(name) != VERSIONS[name] and name in kernels]
    if old:
        _left_aside(place, f"those of another version of {' and '.join(old)}")
    return [Tuned.of(entry) for entry in document["launches"] if entry["kernel"] not in old]


def file_name(gpu: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in gpu) + ".json"
