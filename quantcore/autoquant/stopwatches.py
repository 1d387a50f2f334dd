"""How long one call of linears takes that take turns: two kinds of clock.

On CUDA the calls are captured into a graph, and a time is a replay's over its calls, as a search
for launches has it (quantkernels/tune/timing.py). Graphs of one shape share a pool of memory, since
none is replayed while another is.

Elsewhere it is by the clock, with all that torch and Python add to a call, as an eager model has
it. Between two calls stands what a model does between its linears: a norm, a rotation, a gate, of
one token. A weight that streams through a cache pushes out the code and the data of these, so they
take longer after a dense weight than after a small one: 28 microseconds of a block's 220 in
SmolLM2 (MEASUREMENTS.md). Timed by itself before every slice, their own time is taken off.
"""

import itertools
import time
from typing import Any

import torch
from quantkernels.graphs import capturing, replayed_us
from torch import Tensor, nn

_SLICE_S = 2e-3  # a clock's own time does not show in as much
_REPLAY_US = 250.0  # nor does a graph's beginning and end
_LEAST_SHARE = 0.05  # of what a slice took, if the work between seems to have taken all of it


class Clock:
    def __init__(self, linears: list[nn.Linear], x_TI: Tensor) -> None:
        self._turns = itertools.cycle(linears)
        self._x_TI = x_TI
        self._between = Between(x_TI)
        self._calls = 1
        self._slice()  # the first pays for what is made once
        whole_s, _ = self._slice()
        self._calls = max(1, round(_SLICE_S / whole_s))

    def __call__(self, repeats: int) -> list[float]:
        next(self._turns)(self._x_TI)  # after others' turn
        return [self._of_linears(*self._slice()) for _ in range(repeats)]

    def _of_linears(self, whole_s: float, between_s: float) -> float:
        return max(whole_s - between_s, _LEAST_SHARE * whole_s) * 1e6 / self._calls

    def _slice(self) -> tuple[float, float]:
        """All of it, and the work between by itself."""
        between, linears = self._between, list(itertools.islice(self._turns, self._calls))
        between()
        start = time.perf_counter()
        for _ in linears:
            between()
        middle = time.perf_counter()
        for linear in linears:
            between()
            linear(self._x_TI)
        return time.perf_counter() - middle, middle - start


class Between(nn.Module):
    """What stands between linears, as transformers' modules write it."""

    _HALF = 32

    def __init__(self, x_TI: Tensor) -> None:
        super().__init__()
        self._h = torch.ones(1, 2 * self._HALF, dtype=x_TI.dtype, device=x_TI.device)
        self._scale = torch.ones_like(self._h)

    def forward(self) -> Tensor:
        h = self._h
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        normed = self._scale * wide.to(h.dtype)
        turned = torch.cat((-normed[..., self._HALF :], normed[..., : self._HALF]), dim=-1)
        turned = normed * self._scale + turned * self._scale
        return h + nn.functional.silu(turned.view(1, 1, -1).transpose(0, 1).contiguous()) * turned


class Replay:
    def __init__(self, linears: list[nn.Linear], x_TI: Tensor, pool: Any) -> None:
        for linear in linears[:2]:  # nothing is compiled or searched for from here on
            linear(x_TI)
        torch.cuda.synchronize()
        self._linears, self._x_TI, self._pool = linears, x_TI, pool
        self._calls = len(linears)
        self._graph = self._captured(rounds=1)
        if (rounds := int(_REPLAY_US / min(replayed_us(self._graph, 2))) + 1) > 1:
            self._calls *= rounds
            self._graph = self._captured(rounds)

    def __call__(self, repeats: int) -> list[float]:
        return [taken_us / self._calls for taken_us in replayed_us(self._graph, repeats)]

    def _captured(self, rounds: int) -> torch.cuda.CUDAGraph:
        with capturing(self._pool) as graph:
            for linear in self._linears * rounds:
                linear(self._x_TI)
        return graph
