"""Microseconds of a call on a GPU."""

from collections.abc import Callable, Sequence

import torch

from quantkernels.arrivals import forget
from quantkernels.graphs import capturing, replayed_us


def timed(
    calls: Sequence[Callable[[], object]], replays: int = 20, least_us: float = 0.0
) -> list[float]:
    """Of one call, of calls one after another in a CUDA graph: a figure for each replay, sorted.

    For `least_us` it is replayed before.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    with capturing() as graph:
        for call in calls:
            call()
    graph.replay()
    if least_us:
        replayed_us(graph, 1 + int(least_us / min(replayed_us(graph, 2))))
    times = [taken_us / len(calls) for taken_us in replayed_us(graph, replays)]
    forget()  # this graph is not replayed again, and a search captures many
    return sorted(times)
