"""The work there is, as plain data. A task says what to do; `Worker.run` says how.

Tasks travel between machines, so they hold names and numbers alone. Tensors go from task to task
as numbered parts of a result, which the driver only ever points at: where they were made, within
a process, and as arrays between processes (parcels.py). Tasks that publish name the
epoch of the driver that asks (orchestrator/lease.py): once there is a later one, they refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jobs.spec import EvaluationSpec
from quantcore.schemes import Scheme
from quantcore.tree import Span

if TYPE_CHECKING:  # scipy comes with these, which jobs do without
    from quantcore.autoquant.measurements import HardwareKind, Product, Timing
    from quantcore.autoquant.race import Effort
    from quantcore.autoquant.spots import Spot


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
    """Put a solved block together and begin to write it; `Settle` hears how that ended."""

    block: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until a block that this worker publishes stands in the store."""

    block: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Take chunks that this worker holds through a block: as published, or as the source has it.

    A block that is still being written is made from its codes, which are the inputs then.
    """

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


@dataclass(frozen=True, slots=True)
class Sense:
    """Measure how far schemes move the outputs of some blocks' linears; see sensing.py.

    Each block's errors are written to the store by whoever measures them.
    """

    store: str  # that plans share what they measured in
    key: str  # of the model and texts that it is measured on
    blocks: tuple[int, ...]  # in rising order
    wanted: Mapping[str, tuple[Scheme, ...]]  # by linear


@dataclass(frozen=True, slots=True)
class Diverge:
    """Measure how far the whole model's predictions move as some variants of it.

    Each one's divergence is written to the store by whoever measures it.
    """

    store: str
    key: str
    held_out: tuple[tuple[int, ...], ...]  # token ids
    variants: Mapping[str, dict[str, Scheme]]  # by a digest of its own: linears with schemes


@dataclass(frozen=True, slots=True)
class Race:
    """Time what linears of one shape may become, on the kind of hardware that this worker is."""

    hardware: "HardwareKind"
    spots: "tuple[Spot, ...]"
    factors: Mapping[Scheme, float]
    known: "Mapping[Product, Timing]"  # not timed again
    effort: "Effort"


@dataclass(frozen=True, slots=True)
class Prove:
    """Run the whole model end to end under a few plans, by turns, on this kind of hardware."""

    hardware: "HardwareKind"
    layers: Mapping[str, tuple[str, ...]]  # their linears, which take one choice
    plans: tuple[Mapping[str, str], ...]  # by layer, the label of what it takes
    calls: Mapping[int, float]  # how often with so many tokens
    cache_tokens: int  # of a step
    longest: int  # tokens of a prompt's sequence
    effort: "Effort"


@dataclass(frozen=True, slots=True)
class Account:
    """Tell what of the time spent was not told yet; a device is waited for (see clock.py)."""


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
    | Settle
    | Advance
    | Boundary
    | Round
    | Quantize
    | CopyOutside
    | Evaluate
    | Sense
    | Diverge
    | Race
    | Prove
    | Account
)


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """A chunk's hidden states as the input of a block: the bytes of each micro-batch."""

    block: int
    hidden: tuple[Tensor, ...]  # uint8


@dataclass(frozen=True, slots=True)
class BandMoments:
    """Some nodes of the fixed tree, in rows [first, last) of one LinearGroup's Hessian.

    Rows of the lower triangle alone count, so a band has `last` columns.
    """

    first_row: int
    nodes: dict[Span, tuple[Tensor, int, int]]  # sum of x x^T, tokens, dropped tokens


@dataclass(frozen=True, slots=True)
class InputRanges:
    """Some nodes of the fixed tree: the ranges of one LinearGroup's inputs, and sampled tokens."""

    # lowest, highest, sample, tokens, dropped tokens
    nodes: dict[Span, tuple[Tensor, Tensor, Tensor, int, int]]


@dataclass(frozen=True, slots=True)
class SolvedTile:
    """Rows [first, last) of a stack of linears, quantized."""

    stack: int
    first_row: int
    codes_OI: Tensor  # int8
    scale_OG: Tensor  # float32
    zero_OG: Tensor  # int8; a float zero point: float32
    error_O: Tensor  # float64, per row: its output's squared error, however many tokens
    output_O: Tensor  # float64, per row: the output itself, squared, over the same tokens


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    group: int
    tiles: tuple[SolvedTile, ...]
    facts: dict[str, Any]  # damping, fallback, tokens, dropped, silent inputs, alpha
    norm: dict[str, Tensor] = field(default_factory=dict)  # a smoothed group's, by name
    input_scale: float | None = None  # of a static scheme
    input_factor_I: Tensor | None = None  # that no norm took


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task gives back: a small summary for the driver, and parts for other tasks."""

    summary: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Any, ...] = ()
