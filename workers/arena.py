"""Memory of one worker that other processes of its machine may read.

To map another process's memory takes milliseconds, each time and for each allocation. So whatever
others may read is put into a few large slabs, which each of them maps once and for all
(cudaIpcOpenMemHandle; CUDA C++ Programming Guide, "Interprocess Communication").
"""

import threading
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB_BYTES = 2**28
_ALIGN = 256  # bytes, so that a region may hold any dtype


@dataclass(frozen=True, slots=True, order=True)
class Region:
    slab: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in a slab."""

    region: Region
    shape: tuple[int, ...]
    dtype: torch.dtype

    def within(self, slab_B: Tensor) -> Tensor:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        start = self.region.offset
        return slab_B[start : start + size].view(self.dtype).view(self.shape)


class Arena:
    """Slabs on one device, cut into regions. Slabs stay; regions come free again.

    Regions may be freed by another thread than the one that takes them.
    """

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        self._device, self._slab_bytes = device, slab_bytes
        self._slabs: list[Tensor] = []
        self._free: list[Region] = []  # sorted; no two of them meet
        self._lock = threading.Lock()

    def slab(self, number: int) -> Tensor:
        return self._slabs[number]

    def place(self, tensor: Tensor) -> Placed:
        """A copy of it, contiguous."""
        placed = Placed(self._take(tensor.nbytes), tuple(tensor.shape), tensor.dtype)
        self.at(placed).copy_(tensor)
        return placed

    def at(self, placed: Placed) -> Tensor:
        return placed.within(self._slabs[placed.region.slab])

    def free(self, regions: Iterable[Region]) -> None:
        with self._lock:
            for region in regions:
                self._put_back(region)

    def _take(self, num_bytes: int) -> Region:
        size = max(-(-num_bytes // _ALIGN), 1) * _ALIGN
        with self._lock:
            fitting = [region for region in self._free if region.num_bytes >= size]
            if not fitting:
                fitting = [self._grown(size)]
            found = min(fitting, key=lambda region: region.num_bytes)
            self._free.remove(found)
            if rest := found.num_bytes - size:
                insort(self._free, Region(found.slab, found.offset + size, rest))
            return Region(found.slab, found.offset, size)

    def _grown(self, size: int) -> Region:
        length = max(size, self._slab_bytes)
        self._slabs.append(torch.empty(length, dtype=torch.uint8, device=self._device))
        region = Region(len(self._slabs) - 1, 0, length)
        insort(self._free, region)
        return region

    def _put_back(self, region: Region) -> None:
        for other in list(self._free):
            if other.slab != region.slab:
                continue
            first, second = min(region, other), max(region, other)
            if first.offset + first.num_bytes == second.offset:
                self._free.remove(other)
                region = Region(first.slab, first.offset, first.num_bytes + second.num_bytes)
        insort(self._free, region)
