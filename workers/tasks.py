"""The work there is, as plain data. A task says what to do; `Worker.run` says how.

Tasks travel between machines, so they hold names and numbers alone. Tensors go from task to task
as numbered parts of a result, which the driver only ever points at. Tasks that publish name the
epoch of the driver that asks (orchestrator/lease.py): once there is a later one, they refuse.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.spec import EvaluationSpec
from quantcore.tree import Span


@dataclass(frozen=True, slots=True)
class Survey:
    """Read tensors once: their hashes, and whether each number in them is finite."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Embed:
    """Take chunks of the calibration sequences up to the first block, and keep them."""

    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hand:
    """Give away chunks that this worker holds. One part per chunk."""

    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Take:
    """Hold chunks that others gave away."""

    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget chunks."""

    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """Write chunks that this worker holds, the inputs of a block, to the store."""

    block: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Hold chunks as they were kept in the store, the inputs of a block."""

    block: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Delete what is kept in the store as inputs of blocks [first, last)."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Run a block on chunks that this worker holds and add up the inputs of its LinearGroups.

    One part per row band, group after group; then one for each group whose ranges are wanted.
    """

    block: int
    chunks: tuple[int, ...]
    bands: tuple[int, ...]  # per LinearGroup: how many its Hessian is cut into; 0: not wanted


@dataclass(frozen=True, slots=True)
class Reduce:
    """Finish the tree of sums for one row band of a LinearGroup's Hessian."""

    block: int
    group: int
    band: int


@dataclass(frozen=True, slots=True)
class Solve:
    """Quantize some row tiles of one LinearGroup, from all workers' sums for it."""

    block: int
    group: int
    tiles: tuple[tuple[int, int], ...]  # (stack, tile)


@dataclass(frozen=True, slots=True)
class Save:
    """Write one LinearGroup's statistics to the store, from all workers' sums and ranges for it."""

    block: int
    group: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Put a solved block together and publish it."""

    block: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Take chunks that this worker holds through a block: as published, or as the source has it."""

    block: int
    chunks: tuple[int, ...]
    published: bool = True


@dataclass(frozen=True, slots=True)
class Boundary:
    """Run chunks that this worker holds through blocks [first, last) of the source.

    The worker's own copy stays where it is. One part per chunk.
    """

    first: int
    last: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """Quantize a block by rounding alone, plain or HQQ's, and publish it: no calibration needed."""

    block: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Quantize:
    """Quantize a block from statistics that a job kept, and publish it."""

    block: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CopyOutside:
    """Publish what belongs to no block: embeddings, final norm, output head."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure one variant of the model: 'original', 'rtn' or 'quantized'."""

    variant: str
    spec: EvaluationSpec
    text: str | None  # what spec.text holds


@dataclass(frozen=True, slots=True)
class Probe:
    """Try a block before the job begins, and tell what it took: see probing.py."""

    block: int
    chunks: tuple[int, ...]  # a whole node of the tree of sums, from 0 on
    group: int  # the LinearGroup that is solved
    tiles: tuple[tuple[int, int], ...]  # (stack, tile)


Task = (
    Survey
    | Probe
    | Embed
    | Hand
    | Take
    | Drop
    | Keep
    | Load
    | Sweep
    | Collect
    | Reduce
    | Solve
    | Save
    | Publish
    | Advance
    | Boundary
    | Round
    | Quantize
    | CopyOutside
    | Evaluate
)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """A chunk's hidden states as the input of a block: one array of bytes per micro-batch."""

    block: int
    hidden: tuple[npt.NDArray[np.uint8], ...]


@dataclass(frozen=True, slots=True)
class BandMoments:
    """Some nodes of the fixed tree, in rows [first, last) of one LinearGroup's Hessian.

    Rows of the lower triangle alone count, so a band has `last` columns.
    """

    first_row: int
    nodes: dict[Span, tuple[FloatArray, int, int]]  # sum of x x^T, tokens, dropped tokens


@dataclass(frozen=True, slots=True)
class InputRanges:
    """Some nodes of the fixed tree: the ranges of one LinearGroup's inputs, and sampled tokens."""

    # lowest, highest, sample, tokens, dropped tokens
    nodes: dict[Span, tuple[FloatArray, FloatArray, FloatArray, int, int]]


@dataclass(frozen=True, slots=True)
class SolvedTile:
    """Rows [first, last) of a stack of linears, quantized."""

    stack: int
    first_row: int
    codes_OI: npt.NDArray[np.int8]
    scale_OG: FloatArray
    zero_OG: npt.NDArray[np.int8]
    error_O: npt.NDArray[np.float64]  # per row: its output's squared error, however many tokens
    output_O: npt.NDArray[np.float64]  # per row: the output itself, squared, over the same tokens


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    group: int
    tiles: tuple[SolvedTile, ...]
    facts: dict[str, Any]  # damping, fallback, tokens, dropped, silent inputs, alpha
    norm: dict[str, FloatArray] = field(default_factory=dict)  # a smoothed group's, by name
    input_scale: float | None = None  # of a static scheme
    input_factor_I: FloatArray | None = None  # that no norm took


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task gives back: a small summary for the driver, and parts for other tasks."""

    summary: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Any, ...] = ()
