"""Times of calls that follow one another, as a model's layers do: weights come from memory.

On CUDA the calls are captured into a graph, once through all copies of a weight or more often, so
that a replay lasts a while; a time is a replay's, over its calls. On a CPU it is a round's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from quantkernels.graphs import capturing, replayed_us

CACHE_BYTES = {"cuda": 128 << 20, "cpu": 0}  # more than any GPU's so far; a CPU is for trying
_COPIES = 64  # at most: a smaller weight is no layer's
_REPLAY_US = 250.0  # at least as long, so that its beginning and end don't show
_PASS_US = 60_000.0  # a kernel's turn in a pass, where that makes so many replays:
_FEWEST, _MOST = 7, 50


class Replay(Protocol):
    calls: Sequence[Callable[[], object]]

    def __call__(self, repeats: int = 1) -> list[float]:
        """Microseconds of one call, for each time that all of them ran."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class Times:
    """Of one pass. They compare by their medians."""

    p50_us: float
    p20_us: float
    p80_us: float


def copies(num_bytes: int, device: str) -> int:
    """How many of a weight are more than the cache holds by the time the first comes again."""
    return min(_COPIES, max(2, -(-CACHE_BYTES[device] // num_bytes) + 1))


def prepared(calls: Sequence[Callable[[], object]], device: str, pool: Any = None) -> Replay:
    """The calls have run before: nothing is compiled or searched for from here on.

    Graphs of one pool share its memory, and so are replayed one after another.
    """
    if device != "cuda":
        return _Round(calls)
    once = _captured(calls, pool)
    rounds = int(_REPLAY_US / (min(once(2)) * len(calls))) + 1
    return once if rounds == 1 else _captured(list(calls) * rounds, pool)


def timed(replay: Replay, *, settled: bool = False) -> Times:
    """Of a pass; where `settled`, after as long again of the same.

    A GPU whose matrix units draw all the power that it may have finds its clock only after a while:
    till then it is the one that what ran before has left.
    """
    replay_us = replay(2)[-1] * len(replay.calls)
    count = round(min(_MOST, max(_FEWEST, _PASS_US / replay_us)))
    if settled:
        replay(count)
    times = sorted(replay(count))
    return Times(p50_us=median(times), p20_us=times[count // 5], p80_us=times[-1 - count // 5])


@dataclass(slots=True)
class _Round:
    calls: Sequence[Callable[[], object]]

    def __call__(self, repeats: int = 1) -> list[float]:
        return [self._once() for _ in range(repeats)]

    def _once(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(self.calls)


@dataclass(slots=True)
class _Graph:
    calls: Sequence[Callable[[], object]]
    graph: torch.cuda.CUDAGraph

    def __call__(self, repeats: int = 1) -> list[float]:
        return [taken_us / len(self.calls) for taken_us in replayed_us(self.graph, repeats)]


def _captured(calls: Sequence[Callable[[], object]], pool: Any) -> _Graph:
    with capturing(pool) as graph:
        for call in calls:
            call()
    return _Graph(calls, graph)
