"""Counters for programs that finish a tile together: how many have come; the last sets it to 0.

Launches that may run at once must not share any. Those of one stream follow one another and share;
a launch that is captured into a CUDA graph, which may be replayed on any stream, is given counters
of its own.
"""

import torch
from torch import Tensor

_POOL = 1 << 20  # counters made at once for captured launches

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_pool: dict[torch.device, Tensor] = {}


def arrivals(device: torch.device, count: int) -> Tensor:
    """int32 zeros, at least `count`."""
    if device.type != "cuda":
        return torch.zeros(max(1, count), dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(device, count)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    known = _of_stream.get(key)
    if known is None or len(known) < count:
        known = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _of_stream[key] = known
        if device not in _pool:
            _pool[device] = torch.zeros(_POOL, dtype=torch.int32, device=device)
    return known


def _captured(device: torch.device, count: int) -> Tensor:
    """From the pool; where it is spent, or nothing ran before, zeros that each replay sets."""
    pool = _pool.get(device)
    if pool is None or len(pool) < count:
        return torch.zeros(max(1, count), dtype=torch.int32, device=device)
    _pool[device] = pool[count:]
    return pool[:count]


def forget() -> None:
    """All counters are free again: for a caller whose captured launches are never replayed again.

    Else a process that captures many graphs and drops them comes to the end of the pool, and the
    launches that it captures from then on take longer.
    """
    _of_stream.clear()
    _pool.clear()
