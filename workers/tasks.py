"""The work there is, as plain data. A task says what to do; `Worker.run` says how.

Tasks travel between machines, so they hold names and numbers alone. Tensors go from task to task
as numbered parts of a result, which the driver only ever points at.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.spec import EvaluationSpec
from quantcore.moments import Span


@dataclass(frozen=True, slots=True)
class Survey:
    """Read tensors once: their hashes, and whether each number in them is finite."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Embed:
    """Take chunks [first, last) of the calibration sequences up to the first block."""

    first_chunk: int
    last_chunk: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Run a block on this worker's sequences and add up its inputs. One part per LinearGroup."""

    block: int


@dataclass(frozen=True, slots=True)
class Solve:
    """Quantize some row tiles of one LinearGroup, from all workers' sums for it."""

    block: int
    group: int
    tiles: tuple[tuple[int, int], ...]  # (stack, tile)


@dataclass(frozen=True, slots=True)
class Publish:
    """Put a solved block together and publish it."""

    block: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Take this worker's sequences through a published block."""

    block: int


@dataclass(frozen=True, slots=True)
class Round:
    """Quantize a block by plain rounding and publish it: no calibration needed."""

    block: int


@dataclass(frozen=True, slots=True)
class CopyOutside:
    """Publish what belongs to no block: embeddings, final norm, output head."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure one variant of the model: 'original', 'rtn' or 'quantized'."""

    variant: str
    spec: EvaluationSpec


Task = Survey | Embed | Collect | Solve | Publish | Advance | Round | CopyOutside | Evaluate

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """One worker's nodes of the fixed tree for one LinearGroup."""

    nodes: dict[Span, tuple[FloatArray, int, int]]  # sum of x x^T, tokens, dropped tokens


@dataclass(frozen=True, slots=True)
class SolvedTile:
    """Rows [first, last) of a stack of linears, quantized."""

    stack: int
    first_row: int
    codes_OI: npt.NDArray[np.int8]
    scale_OG: FloatArray
    zero_OG: npt.NDArray[np.int8]
    error_O: npt.NDArray[np.float64]  # per row: e H e^T, what its rounding does to the output
    output_O: npt.NDArray[np.float64]  # per row: w H w^T, the output itself


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    group: int
    tiles: tuple[SolvedTile, ...]
    facts: dict[str, Any]  # damping, fallback, tokens, dropped, silent inputs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task gives back: a small summary for the driver, and parts for other tasks."""

    summary: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Any, ...] = ()
