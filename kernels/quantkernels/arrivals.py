"""Counters for programs that finish a tile together: how many have come; the last sets it to 0.

Launches that may run at once must not share any. Those of one stream follow one another and share;
a launch that is captured into a CUDA graph, which may be replayed on any stream, is given counters
of its own. They come out of a pool, made while nothing is captured, and again when half is spent.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_POOL = 1 << 20  # counters made at once for captured launches
_ALIGNED = 4  # counters in 16 bytes

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_pools: dict[torch.device, list[Tensor]] = {}  # what is left of each; graphs may use the rest


def arrivals(device: torch.device, count: int) -> Tensor:
    """int32 zeros, at least `count`."""
    if device.type != "cuda":
        return torch.zeros(max(1, count), dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(device, count)
    pools = _pools.setdefault(device, [])
    if not pools or len(pools[-1]) < _POOL // 2:
        pools.append(torch.zeros(_POOL, dtype=torch.int32, device=device))
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    known = _of_stream.get(key)
    if known is None or len(known) < count:
        known = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _of_stream[key] = known
    return known


def _captured(device: torch.device, count: int) -> Tensor:
    """From the latest pool; where it is spent, or nothing ran before, zeros that replays set.

    They begin where 16 bytes do, all of them: Triton compiles anew for a pointer that does not.
    """
    count = -(-count // _ALIGNED) * _ALIGNED
    pools = _pools.get(device, [])
    if not pools or len(pools[-1]) < count:
        return torch.zeros(max(1, count), dtype=torch.int32, device=device)
    own = pools[-1][:count]
    pools[-1] = pools[-1][count:]
    return own


def forget() -> None:
    """All counters are free again: for a caller whose captured launches are not replayed again."""
    _of_stream.clear()
    _pools.clear()


@contextmanager
def apart() -> Iterator[None]:
    """What is captured within is not replayed after it; what was captured before goes on to be."""
    of_stream, pools = dict(_of_stream), dict(_pools)
    forget()
    try:
        yield
    finally:
        forget()
        _of_stream.update(of_stream)
        _pools.update(pools)
