"""How the kernel is launched for a shape: found by a search, kept as data, chosen here.

Data are JSON, one file a GPU (`tuned/NVIDIA_H200.json`), made by `python -m quantkernels.tune`. An
entry is the best launch for codes, group, rows, columns and tokens, with what it and the dense
product took. A shape that was not tuned takes the nearest that was; a GPU without data takes what
is usual. Data of another kernel version are left aside with a warning, and so are damaged ones.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from quantkernels.weight_only.tiles import BITS, COLUMNS, Codes, Tiles

KERNEL_VERSION = 1  # raised whenever a launch that was tuned may no longer be the best, or exist
FOLDER_VARIABLE = "QUANTFLEET_TUNED"  # a folder whose files are read before those shipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    rows: int  # of a program: 32, 64, 128 or 256
    tokens: int  # of a program: 8 or more
    split: int  # spans of a row's columns
    turn: int  # columns that are loaded at once: 128 or 256
    stages: int
    warps: int
    early: bool = False  # whether values are scaled, and not sums
    dense: bool = False  # make the weight dense and multiply by that: the rest has no meaning

    def __post_init__(self) -> None:
        good = (
            self.rows in (32, 64, 128, 256)
            and self.tokens in (8, 16, 32, 64, 128, 256)
            and 1 <= self.split <= 64
            and self.turn in (128, COLUMNS)
            and 1 <= self.stages <= 8
            and self.warps in (1, 2, 4, 8, 16)
        )
        if not good:
            raise ValueError(f"a launch that cannot be: {self}")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        return cls(**{field.name: document[field.name] for field in fields(cls)})


DENSE = Config(rows=128, tokens=64, split=1, turn=128, stages=3, warps=8, dense=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    codes: Codes
    group: int
    rows: int
    columns: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    shape: Shape
    config: Config
    time_us: float
    dense_us: float  # of the same product by a bfloat16 weight

    def document(self) -> dict[str, Any]:
        times = {"time_us": self.time_us, "dense_us": self.dense_us}
        return {**asdict(self.shape), "config": asdict(self.config), **times}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        shape = Shape(**{field.name: document[field.name] for field in fields(Shape)})
        if shape.codes not in BITS:
            raise ValueError(f"codes {shape.codes!r}")
        return cls(
            shape=shape,
            config=Config.of(document["config"]),
            time_us=float(document["time_us"]),
            dense_us=float(document["dense_us"]),
        )


def choose(weight: Tiles, tokens: int, gpu: str, units: int) -> Config:
    """The launch for a weight and a number of tokens, on a GPU by its name and multiprocessors."""
    rows, columns = weight.features
    shape = Shape(
        codes=weight.kind, group=weight.group, rows=rows, columns=columns, tokens=max(1, tokens)
    )
    return _chosen(shape, gpu, units)


@cache
def _chosen(shape: Shape, gpu: str, units: int) -> Config:
    known = [
        entry
        for entry in load(gpu)
        if entry.shape.codes == shape.codes and _tokens_apart(entry.shape, shape) <= 1
    ]
    if not known:
        return usual(shape, units)
    nearest = min(known, key=lambda entry: _distance(entry.shape, shape))
    return nearest.config if nearest.config.dense else _fitted(nearest, shape)


def usual(shape: Shape, units: int) -> Config:
    """Without data: enough programs for every multiprocessor, dense from where products bind."""
    if shape.tokens > 256:
        return DENSE
    tokens = max(16, 1 << (shape.tokens - 1).bit_length())
    wide = tokens >= 64
    config = Config(
        rows=128 if wide else 64,
        tokens=min(tokens, 128),
        split=1,
        turn=128,
        stages=3 if wide else 4,
        warps=8 if wide else 4,
        early=tokens > 64,
    )
    programs = -(-shape.rows // config.rows) * -(-shape.tokens // config.tokens)
    turns = -(-shape.columns // config.turn)
    split = min(16, max(1, 2 * units // programs), max(1, turns // 4))
    return replace(config, split=split)


def load(gpu: str) -> list[Tuned]:
    """What is known of a GPU: from the folder that the environment names, else as shipped."""
    return _load(gpu, os.environ.get(FOLDER_VARIABLE, ""))


@cache
def _load(gpu: str, folder: str) -> list[Tuned]:
    name = file_name(gpu)
    shipped = files("quantkernels") / "tuned" / name
    own = Path(folder) / name if folder else None
    for text in _texts([own, shipped]):
        try:
            return parse(text)
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"tuned launches in {name} are left aside ({error}): make them anew with "
                "python -m quantkernels.tune",
                stacklevel=2,
            )
    return []


def parse(text: str) -> list[Tuned]:
    """Raises ValueError, KeyError or TypeError for data that are damaged or of another version."""
    document = json.loads(text)
    version = document["kernel_version"]
    if version != KERNEL_VERSION:
        raise ValueError(f"they are of kernel version {version}, and this is {KERNEL_VERSION}")
    return [Tuned.of(entry) for entry in document["weight_only"]]


def file_name(gpu: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in gpu) + ".json"


def _texts(places: Iterable[Any]) -> Iterable[str]:
    for place in places:
        if place is not None and place.is_file():
            yield place.read_text()


def _distance(one: Shape, other: Shape) -> tuple[float, ...]:
    """In powers of two, tokens first; of two as far, the one for more tokens is nearer."""
    size = sum(
        abs(math.log2(max(1, of_one)) - math.log2(max(1, of_other)))
        for of_one, of_other in ((one.rows, other.rows), (one.columns, other.columns))
    )
    return _tokens_apart(one, other), -one.tokens, size, float(one.group != other.group)


def _tokens_apart(one: Shape, other: Shape) -> int:
    """Up to 8 tokens are one to the kernel."""
    heights = [max(3, (shape.tokens - 1).bit_length()) for shape in (one, other)]
    return abs(heights[0] - heights[1])


def _fitted(nearest: Tuned, shape: Shape) -> Config:
    """As many programs as the nearest shape's launch had, by another split."""
    config = nearest.config

    def tiles_of(rows: int, tokens: int) -> int:
        return -(-rows // config.rows) * -(-tokens // config.tokens)

    programs = tiles_of(nearest.shape.rows, nearest.shape.tokens) * config.split
    turns = -(-shape.columns // config.turn)
    split = round(programs / max(1, tiles_of(shape.rows, shape.tokens)))
    return replace(config, split=max(1, min(split, 16, turns)))
