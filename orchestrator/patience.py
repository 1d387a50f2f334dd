"""When a worker that does not die is given up all the same.

A worker counts as lost when it does not answer its pulse, which a thread of its own answers during
every task: its process is stopped or frozen. It also counts as lost when a task takes far longer
than any comparable one took in this job. Tasks are compared with those of the same kind on the same
shapes, by what they have a number of (chunks, row tiles). Some have a length of their own: of these
only the pulse is asked for.

A task that is merely slow must not end worker after worker, and with them the job: each time a
worker is given up, the step of a block that it was at is given four times as long from then on.
"""

import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from orchestrator.scheduler import MOST_LOSSES, Assignment, step_of
from workers.plan import LayerPlan, Plan
from workers.store import STORE_PATIENCE_S
from workers.tasks import (
    Account,
    Advance,
    Boundary,
    Collect,
    CopyOutside,
    Diverge,
    Drop,
    Embed,
    Evaluate,
    Hand,
    Keep,
    Load,
    Probe,
    Prove,
    Publish,
    Quantize,
    Race,
    Reduce,
    Round,
    Save,
    Sense,
    Settle,
    Solve,
    Survey,
    Sweep,
    Take,
    Task,
)

FETCH_TIMEOUT_S = 600.0  # that a task itself waits for its inputs
_STORE_WAITS_S = 3 * STORE_PATIENCE_S  # that it may wait for the store, a request after another
_LONGEST_LOOK_S = 5.0
_MORE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    pulse_every_s: float = 1.0
    silent_s: float = 120.0  # far beyond what a load of files or a long call holds Python up
    shortest_s: float = 300.0  # no task is given up sooner
    times_usual: float = 20.0


class OwnTime:
    """Seconds in which this process looked: one that was stopped itself has missed nothing."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        here = time.monotonic()
        self._seconds += min(here - self._last, _LONGEST_LOOK_S)
        self._last = here
        return self._seconds


_AT_THE_STORE = Publish | Settle | Round | Quantize | Save | Advance | Keep | Load


class Judge:
    """Says which of the workers that still run are to be given up, and why."""

    def __init__(self, plan: Plan, patience: Patience) -> None:
        self._plan = plan
        self._patience = patience
        self._longest: dict[Hashable, tuple[float, float]] = {}  # of one task, and per unit
        self._losses: Counter[Hashable] = Counter()  # by step

    def finished(self, assignment: Assignment, seconds: float, device: str = "") -> None:
        """Tasks are compared with those of the same device alone."""
        if (found := _comparable(self._plan, assignment.task)) is not None:
            key, units = (device, found[0]), found[1]
            whole, each = self._longest.get(key, (0.0, 0.0))
            self._longest[key] = (max(whole, seconds), max(each, seconds / units))

    def gave_up(self, assignment: Assignment) -> None:
        self._losses[step_of(assignment.task)] += 1

    def silent(self, assignment: Assignment | None, seconds: float) -> str | None:
        """A worker has not answered for so long."""
        if seconds <= self._patience.silent_s * self._more(assignment):
            return None
        doing = f" at {assignment.id}" if assignment else ""
        return f"it does not answer: {seconds:.0f} s of silence{doing}"

    def slow(self, assignment: Assignment, seconds: float, device: str = "") -> str | None:
        """A task has run for so long. What it may wait for by itself is not held against it."""
        usual = self._usual_s(assignment.task, device)
        if usual is None:
            return None
        limit = max(self._patience.shortest_s, self._patience.times_usual * usual)
        waits = FETCH_TIMEOUT_S if assignment.inputs else 0.0
        if isinstance(assignment.task, _AT_THE_STORE):
            waits += _STORE_WAITS_S
        if seconds <= waits + limit * self._more(assignment):
            return None
        return f"it hangs: {seconds:.0f} s at {assignment.id}, where {usual:.1f} s were the longest"

    def _usual_s(self, task: Task, device: str) -> float | None:
        """The longest that was seen, by chunk or tile where that is longer; None before any."""
        found = _comparable(self._plan, task)
        if found is None or (device, found[0]) not in self._longest:
            return None
        whole, each = self._longest[device, found[0]]
        return max(whole, each * found[1])

    def _more(self, assignment: Assignment | None) -> float:
        losses = 0 if assignment is None else self._losses[step_of(assignment.task)]
        return _MORE ** min(losses, MOST_LOSSES)


def _comparable(plan: Plan, task: Task) -> tuple[Hashable, int] | None:  # noqa: PLR0911 - a table
    """What a task is compared by, and how many units it consists of; None: with no other."""
    kind = type(task).__name__
    match task:
        case Survey() | Probe() | Evaluate() | CopyOutside() | Sweep() | Account():
            return None
        case Sense() | Diverge() | Race() | Prove():
            return None
        case Embed(chunks) | Hand(chunks) | Take(chunks) | Drop(chunks):
            return kind, _count(chunks)
        case Keep(chunks=chunks) | Load(chunks=chunks):
            return kind, _count(chunks)
        case Collect(block, chunks):
            return (kind, _shape(plan, block)), _count(chunks)
        case Advance(block, chunks, published):
            return (kind, _shape(plan, block), published), _count(chunks)
        case Boundary(first, last, chunks):
            return (kind, first, last), _count(chunks)
        case Solve(block, group, tiles):
            stacks = plan.blocks[block].groups[group].stacks()
            alike = frozenset(_layer(stacks[stack][0]) for stack, _ in tiles)
            return (kind, alike), _count(tiles)
        case Reduce(block, group) | Save(block, group):
            return (kind, plan.blocks[block].groups[group].in_features), 1
        case Publish(block) | Settle(block) | Round(block) | Quantize(block):
            return (kind, _shape(plan, block)), 1


def _count(units: tuple[object, ...]) -> int:
    return max(1, len(units))


def _shape(plan: Plan, block: int) -> Hashable:
    """The same for blocks whose linears have equal shapes and are quantized alike."""
    layers = [layer for group in plan.blocks[block].groups for layer in group.layers]
    return tuple((layer.out_features, *_layer(layer)) for layer in layers)


def _layer(layer: LayerPlan) -> tuple[Hashable, ...]:
    return layer.in_features, layer.scheme, layer.method
