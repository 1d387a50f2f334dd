"""Microseconds of a call on a GPU."""

from collections.abc import Callable, Sequence

import torch

from quantkernels.graphs import capturing
from quantkernels.weight_only.arrivals import forget


def timed(calls: Sequence[Callable[[], object]], replays: int = 20) -> list[float]:
    """Of one call, of calls one after another in a CUDA graph: a figure for each replay, sorted."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    with capturing() as graph:
        for call in calls:
            call()
    graph.replay()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(calls))
    forget()  # this graph is not replayed again, and a search captures many
    return sorted(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
