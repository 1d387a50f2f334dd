"""CUDA graphs, captured and timed undisturbed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


@contextmanager
def capturing(pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is called inside; ``pool`` is the memory that it may share.

    The end of another graph is refused while one is captured, and spoils it. Graphs that nothing
    holds but a cycle end whenever Python collects, so it waits.
    """
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield graph
    finally:
        if collects:
            gc.enable()


def replayed_us(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """Microseconds of each of so many replays, by events on the GPU.

    One after another without a pause, and one before the first: while the GPU works on one the host
    sends the next, and what the host takes is in none, as long as a replay takes longer.
    """
    marks = [_event() for _ in range(repeats + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [float(start.elapsed_time(end)) * 1e3 for start, end in pairwise(marks)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
