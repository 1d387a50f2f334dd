"""What launches are searched for: a product's random weights and inputs, and how it is run.

Shape suffixes: O = out_features, I = in_features, T = tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkernels import w8a8, weight_only
from quantkernels.choice import by_foretold_end, distance, tokens_apart
from quantkernels.launches import (
    BITS,
    OTHER,
    SHARED_BYTES,
    Kernel,
    Launch,
    Shape,
    Tuned,
    narrow,
    shared_bytes,
)
from quantkernels.w8a8 import Weight8
from quantkernels.w8a8 import fused as w8a8_fused
from quantkernels.weight_only import fused as weight_only_fused
from quantkernels.weight_only import tiles

DTYPE = torch.bfloat16
SUMS = 4096  # of a warp, at most: a half of its registers
# rows and warps of a program, and stages: for few tokens and for more
FEW = ((32, 1), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4)), (3, 4, 5, 6)
MORE = ((64, 4), (128, 4), (128, 8), (256, 8)), (2, 3, 4, 5)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Subject:
    weight: Callable[[Shape, str], Any]  # random, on a device; "meta" to compile for
    inputs: Callable[[Shape, str], Any]
    run: Callable[[Launch, Any, Any], Tensor]
    compile: Callable[[Launch, Any, Any], object]
    dense: Callable[[Any], Tensor]  # the weight's values (O, I), bfloat16
    served: Callable[[Any], Tensor]  # the inputs' values (T, I), bfloat16
    bytes: Callable[[Any], int]  # of a weight's codes


def candidates(shape: Shape, units: int, *, hopper: bool) -> Iterator[Launch]:
    """Launches worth a try on so many multiprocessors: they fit one, and give all of them work."""
    if hopper and _overlaps(shape):
        yield from _overlapped(shape, units)
    if shape.tokens >= 128:
        yield OTHER
    if shape.kernel == "weight_only" and shape.tokens > (128 if hopper else 2048):
        return
    padded = 1 << (shape.tokens - 1).bit_length()
    widths = (8, 16) if padded <= 8 else (min(padded, 128),) if padded < 256 else (128, 256)
    for tokens in widths:
        heights, stages = FEW if tokens <= 16 else MORE
        for (rows, warps), turn, stage, split, early in product(
            heights, _turns(shape, tokens), stages, SPLITS, _scalings(shape, tokens)
        ):
            launch = Launch(
                rows=rows,
                tokens=tokens,
                split=split,
                turn=turn,
                stages=stage,
                warps=warps,
                early=early,
            )
            if _sensible(launch, shape, units):
                yield launch


def familiar(shape: Shape, known: Iterable[Tuned], units: int) -> Iterator[Launch]:
    """Those that are another shape's best for about as many tokens, what should end first first."""
    if shape.tokens >= 128:
        yield OTHER
    near = [
        entry
        for entry in known
        if (entry.shape.kernel, entry.shape.codes) == (shape.kernel, shape.codes)
        and tokens_apart(entry.shape, shape) <= 1
        and not entry.launch.other
    ]
    near.sort(key=lambda entry: distance(entry.shape, shape))
    found = by_foretold_end(near, shape, units)
    yield from (launch for launch in found if _sensible(launch, shape, units))


def _overlaps(shape: Shape) -> bool:
    """Whether Hopper's own kernels have been the faster ones for so many tokens."""
    if shape.kernel == "weight_only":
        return shape.tokens >= 32
    return shape.codes == "int8" and shape.tokens > 64


def _overlapped(shape: Shape, units: int) -> Iterator[Launch]:
    padded = 1 << (shape.tokens - 1).bit_length()
    widths = (padded,) if padded <= 64 else (64, 128) if padded == 128 else (128, 256)
    by_values = shape.kernel == "weight_only"
    ahead = [(128, stages) for stages in ((2, 3, 4, 5) if by_values else (3, 4, 6))]
    if by_values and BITS[shape.codes] == 8:
        ahead += [(64, stages) for stages in (3, 4, 5, 6, 8)]
    for tokens, (rows, warps), (turn, stages), split in product(
        widths, ((128, 4), (128, 8), (256, 8)), ahead, SPLITS
    ):
        launch = Launch(
            rows=rows,
            tokens=tokens,
            split=split,
            turn=turn,
            stages=stages,
            warps=warps,
            early=True,
            overlapped=True,
        )
        if _sensible(launch, shape, units) and rows * tokens <= SUMS * warps:
            yield launch


def _turns(shape: Shape, tokens: int) -> tuple[int, ...]:
    if shape.kernel == "w8a8":
        return (128,)
    short = (64,) if BITS[shape.codes] == 8 and shape.group <= 64 and tokens > 16 else ()
    long = (256,) if tokens <= 64 else ()
    return *short, 128, *long


def _scalings(shape: Shape, tokens: int) -> tuple[bool, ...]:
    """Whether to scale values, or sums, which are the fewer where tokens are few."""
    if shape.kernel != "weight_only" or shape.group == 0 or tokens < 32:
        return (False,)
    return (False, True) if tokens <= 64 else (True,)


def _sensible(launch: Launch, shape: Shape, units: int) -> bool:
    tiles = -(-shape.rows // launch.rows) * -(-shape.tokens // launch.tokens)
    programs = tiles * launch.split
    # work for three of four multiprocessors, or for two of five where products bind: a tile cut in
    # two for the others costs more than they save; no more spans than give each eight programs
    least = units * 2 // 5 if launch.overlapped else units * 3 // 4
    fills = programs >= least and (launch.split == 1 or programs <= 8 * units)
    fits = shared_bytes(launch, shape) <= SHARED_BYTES
    long = launch.turn * launch.split <= shape.columns and not narrow(launch, shape.group)
    return fits and fills and long


def _codes(shape: Shape, device: str) -> Tensor:
    size = (shape.rows, shape.columns)
    if shape.codes == "float8":
        return torch.randn(size, device=device).to(torch.float8_e4m3fn).view(torch.int8)
    half = 1 << (BITS[shape.codes] - 1)
    return torch.randint(-half, half, size, device=device, dtype=torch.int8)


def _scale(shape: Shape, device: str) -> Tensor:
    groups = shape.columns // shape.group if shape.group else 1
    return (torch.rand(shape.rows, groups, device=device) / 64).to(DTYPE)


def _weight_only_weight(shape: Shape, device: str) -> tiles.Tiles:
    empty = torch.empty(4, device=device)
    meta = device == "meta"
    blocks = -(-shape.rows // tiles.ROWS)
    pieces = -(-shape.columns // tiles.COLUMNS) * BITS[shape.codes] // 2
    return tiles.Tiles(
        codes_RPBW=empty.new_empty((blocks, pieces, tiles.ROWS, tiles.WORDS), dtype=torch.int16)
        if meta
        else tiles.pack_codes(_codes(shape, device), shape.codes),
        scale=empty.to(DTYPE)
        if meta
        else tiles.pack_groups(_scale(shape, device), shape.columns, shape.group),
        zero=None,
        kind=shape.codes,
        grid="float8" if shape.codes == "float8" else "affine",
        group=shape.group,
        features=(shape.rows, shape.columns),
    )


def _weight_only_run(launch: Launch, x_TI: Tensor, weight: tiles.Tiles) -> Tensor:
    if launch.other:
        return linear(x_TI, weight_only_fused.dense(weight, x_TI.dtype))
    return weight_only_fused.linear(x_TI, weight, None, launch)


def _w8a8_weight(shape: Shape, device: str) -> Weight8:
    codes_OI = _codes(shape, device)
    return Weight8(
        codes_OI=codes_OI.view(torch.float8_e4m3fn) if shape.codes == "float8" else codes_OI,
        scale_O=_scale(shape, device)[:, 0].float(),
        kind=shape.codes,
        features=(shape.rows, shape.columns),
    )


W8a8Inputs = tuple[Tensor, Tensor]


def _w8a8_inputs(shape: Shape, device: str) -> W8a8Inputs:
    codes_TI = _codes(replace(shape, rows=shape.tokens), device)
    scale_T = torch.rand(shape.tokens, device=device)
    return codes_TI.view(torch.float8_e4m3fn) if shape.codes == "float8" else codes_TI, scale_T


def _w8a8_run(
    launch: Launch, inputs: W8a8Inputs, weight: Weight8, *, compile_only: bool = False
) -> Tensor:
    codes_TI, scale_T = inputs
    if launch.other and w8a8.vendor.takes(codes_TI, weight, DTYPE):
        return w8a8.vendor.linear(codes_TI, scale_T, weight, None, DTYPE)
    return w8a8_fused.linear(
        codes_TI, scale_T, weight, None, DTYPE, launch, compile_only=compile_only
    )


SUBJECTS: dict[Kernel, Subject] = {
    "weight_only": Subject(
        weight=_weight_only_weight,
        inputs=lambda shape, device: torch.randn(
            shape.tokens, shape.columns, device=device, dtype=DTYPE
        ),
        run=_weight_only_run,
        compile=lambda launch, x_TI, weight: weight_only_fused.linear(
            x_TI, weight, None, launch, compile_only=True
        ),
        dense=lambda weight: weight_only.dense(weight, DTYPE),
        served=lambda x_TI: x_TI,
        bytes=lambda weight: weight.codes_RPBW.nbytes,
    ),
    "w8a8": Subject(
        weight=_w8a8_weight,
        inputs=_w8a8_inputs,
        run=_w8a8_run,
        compile=lambda launch, inputs, weight: _w8a8_run(launch, inputs, weight, compile_only=True),
        dense=lambda weight: w8a8.reference.values(weight).to(DTYPE),
        served=lambda inputs: (inputs[0].float() * inputs[1][:, None]).to(DTYPE),
        bytes=lambda weight: weight.codes_OI.nbytes,
    ),
}
