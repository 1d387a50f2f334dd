"""Which launch a product takes: its shape's own where that was tuned, or what near ones foretell.

A shape that was not tuned takes after the nearest that were, by tokens, rows and columns, of a GPU
of the same multiprocessors where its own has none as near; without data it takes what is usual.
`nearest` tells a planner where a bfloat16 weight is faster:

    found = nearest(Shape(kernel="weight_only", codes="int4", group=128, rows=6144, columns=4096,
                          tokens=512), "NVIDIA H200")
    found is None or found.ratio > 1

It matters how evenly programs fill the multiprocessors: 160 of them take as long as 264 on 132. So
of the launches of a few near shapes, for few tokens of the nearest, split in every way, the one is
taken that should end first. A launch's time is foretold by rounds of programs, of which each takes
a while to begin and then so long for each turn, as the entry's own time tells; and by the sums that
spans write and read. On an H200, of 9 shapes of other models where only those of an 8B model were
known (up to 60 launches timed of each), what is so taken is as fast as the best one to 0.96 in the
mean for weight-only products of 1 to 32 tokens (0.83 at worst) and of 64 to 2,048 (0.73), and to
0.98 for 8-bit inputs (0.76).

This is for products that serve. The kernels of calibration are not chosen by time (bits.py); here
the order of a product's sums may differ from GPU to GPU, as it does with a vendor's library.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol

import torch

from quantkernels.launches import (
    OTHER,
    Codes,
    Kernel,
    Launch,
    Shape,
    Tuned,
    load,
    narrow,
)

Gpu = tuple[str, int]  # its name, and how many multiprocessors it has

# the same multiprocessors beside another memory: what is not known of one is taken from the other
SIBLINGS = {"NVIDIA H200": "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3": "NVIDIA H200"}
FEW = 64  # tokens, from which on several near entries are weighed
_NEAR = 4  # entries whose launches are weighed against each other
_FARTHER = 1.03  # by what a farther entry's word counts for less than one before it
_SPLITS = range(1, 17)
_RESIDENT = 4  # programs that a multiprocessor works on at once
_RESIDENT_OF_FEW = 8  # of few tokens: they are small
# microseconds: of a launch, of an overlapped program's beginning, of a megabyte of spans' sums
_BEGINS = 2.0
_STARTS = 3.0
_SUMS: dict[Kernel, float] = {"weight_only": 0.35, "w8a8": 1.2}
_SUMS_OF_FEW = 0.8
_OVERLAPPED_SUMS = 0.75


class Tiled(Protocol):
    """What a launch hangs on of a weight as it lies for one of the kernels."""

    @property
    def kind(self) -> Codes: ...
    @property
    def group(self) -> int: ...
    @property
    def features(self) -> tuple[int, int]: ...


def launch_of(kernel: Kernel, tokens: int, weight: Tiled, gpu: Gpu) -> Launch:
    """How a kernel's product is launched on a GPU."""
    rows, columns = weight.features
    shape = Shape(
        kernel=kernel,
        codes=weight.kind,
        group=weight.group,
        rows=rows,
        columns=columns,
        tokens=tokens,
    )
    return choose(shape, *gpu)


@cache
def choose(shape: Shape, gpu: str, units: int) -> Launch:
    """The launch for a shape, on a GPU by its name and its number of multiprocessors."""
    first = nearest(shape, gpu)
    if first is None:
        return usual(shape, units)
    if first.launch.other or distance(first.shape, shape) == 0:
        return first.launch
    near = [entry for entry in _by_distance(shape, gpu, foreign=1.0) if not entry.launch.other]
    return by_foretold_end(near[: 1 if shape.tokens < FEW else _NEAR], shape, units)[0]


def nearest(shape: Shape, gpu: str) -> Tuned | None:
    """What is known of the nearest shape, on a GPU by its name; None without data."""
    return next(iter(_by_distance(shape, gpu)), None)


def _by_distance(shape: Shape, gpu: str, foreign: float = 0.0) -> list[Tuned]:
    """Of the GPU and its sibling, whose entries are so much farther."""

    def key(found: tuple[Tuned, int]) -> tuple[float, ...]:
        entry, sibling = found
        apart = distance(entry.shape, shape) + foreign * sibling
        tokens = entry.shape.tokens
        return apart, tokens != shape.tokens, -tokens, sibling, entry.shape.group != shape.group

    known = [
        (entry, sibling)
        for sibling, name in enumerate((gpu, SIBLINGS.get(gpu, "")))
        for entry in load(name)
        if entry.shape.kernel == shape.kernel
        and entry.shape.codes == shape.codes
        and tokens_apart(entry.shape, shape) <= 1
        and (entry.shape.group == shape.group or not narrow(entry.launch, shape.group))
    ]
    return [entry for entry, _ in sorted(known, key=key)]


def distance(one: Shape, other: Shape) -> float:
    """In powers of two: of tokens, and half of what rows and columns differ by.

    Up to 64 tokens one for fewer is twice as far: tiles of fewer tokens read the weight twice.
    """
    size = sum(
        abs(math.log2(max(1, of_one)) - math.log2(max(1, of_other)))
        for of_one, of_other in ((one.rows, other.rows), (one.columns, other.columns))
    )
    step = 2 if one.tokens < other.tokens <= FEW else 1
    return tokens_apart(one, other) * step + size / 2


def tokens_apart(one: Shape, other: Shape) -> int:
    """Up to 8 tokens are one to the kernel, and of 4,096 or more each is some programs more."""
    heights = [min(12, max(3, (shape.tokens - 1).bit_length())) for shape in (one, other)]
    return abs(heights[0] - heights[1])


def usual(shape: Shape, units: int) -> Launch:
    """Without data: programs for every multiprocessor; no kernel of ours where products bind."""
    if shape.tokens > 256:
        return OTHER
    tokens = max(16, 1 << (shape.tokens - 1).bit_length())
    wide = tokens >= FEW
    launch = Launch(
        rows=128 if wide else 64,
        tokens=min(tokens, 128),
        split=1,
        turn=128,
        stages=3 if wide else 4,
        warps=8 if wide else 4,
        early=tokens > FEW,
    )
    turns = -(-shape.columns // launch.turn)
    split = min(16, max(1, 2 * units // _programs(launch, shape)), max(1, turns // 4))
    return replace(launch, split=split)


def by_foretold_end(near: Sequence[Tuned], shape: Shape, units: int) -> list[Launch]:
    """Launches of entries from near to far, split in every way: first what should end first."""
    weighed: dict[Launch, float] = {}
    for rank, entry in enumerate(near):
        for launch in _splits(entry.launch, shape, units):
            end_us = foretold(entry, launch, shape, units) * _FARTHER**rank
            weighed.setdefault(launch, end_us)
    return sorted(weighed, key=weighed.__getitem__)


def foretold(known: Tuned, launch: Launch, shape: Shape, units: int) -> float:
    """Microseconds of a shape's product, where the launch is that of what is known but for spans.

    Programs that share a multiprocessor hide each other's waiting: fewer are no faster each.
    """
    starts = _STARTS if launch.overlapped else 0.0
    before, rounds = _rounds(known.launch, known.shape, units), _rounds(launch, shape, units)
    fixed = _BEGINS + before * starts + _of_sums(known.launch, known.shape)
    turn_us = max(0.3 * known.time_us, known.time_us - fixed)
    turn_us /= before * _turns(known.launch, known.shape)
    rounds = max(rounds, min(_resident(launch, shape), before))
    taken = rounds * (starts + _turns(launch, shape) * turn_us)
    return _BEGINS + taken + _of_sums(launch, shape)


def _resident(launch: Launch, shape: Shape) -> int:
    if launch.overlapped:
        return 8 // launch.warps
    return _RESIDENT_OF_FEW if shape.tokens < FEW else _RESIDENT


def _splits(launch: Launch, shape: Shape, units: int) -> Iterator[Launch]:
    most = units * (2 if launch.overlapped else 4 if shape.tokens >= FEW else 8)
    for split in _SPLITS:
        parted = replace(launch, split=split)
        fits = launch.turn * split <= shape.columns and _programs(parted, shape) <= most
        if split == 1 or fits:
            yield parted


def _programs(launch: Launch, shape: Shape) -> int:
    return -(-shape.rows // launch.rows) * -(-shape.tokens // launch.tokens) * launch.split


def _rounds(launch: Launch, shape: Shape, units: int) -> int:
    return -(-_programs(launch, shape) // units)


def _turns(launch: Launch, shape: Shape) -> int:
    """Of a program."""
    return -(-shape.columns // (launch.turn * launch.split))


def _of_sums(launch: Launch, shape: Shape) -> float:
    """Microseconds that spans' sums take to be written and added up."""
    if launch.split == 1:
        return 0.0
    megabytes = 4e-6 * _programs(launch, shape) * launch.rows * launch.tokens
    if launch.overlapped:
        return _OVERLAPPED_SUMS * megabytes
    few = shape.tokens < FEW and shape.kernel == "weight_only"
    return (_SUMS_OF_FEW if few else _SUMS[shape.kernel]) * megabytes


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cuda":
        cuda = torch.cuda.get_device_properties(device)
        return cuda.name, cuda.multi_processor_count
    xpu = torch.xpu.get_device_properties(device)
    return xpu.name, xpu.max_compute_units
