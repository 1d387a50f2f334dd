"""CUDA graphs, captured undisturbed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is called inside; ``pool`` is the memory that it may share.

    The end of another graph is refused while one is captured, and spoils it. Graphs that nothing
    holds but a cycle end whenever Python collects: before, then, and not within.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield graph
    finally:
        if collects:
            gc.enable()
