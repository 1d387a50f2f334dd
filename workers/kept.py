"""Results' parts that stay with the worker that made them, on its device, and who reads them.

Its own process copies them. Processes on other GPUs of the machine map its slabs (arena.py) and
copy out of them. To all others they go as arrays, once they are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.arena import Arena, Placed, Region
from workers.parcels import Lent, borrowed, lent, mapped, packed, unpacked

Slab = tuple[int, int]  # whose, and its number there


@dataclass(frozen=True, slots=True)
class Own:
    """A part that the reader has itself."""

    assignment: str
    part: int


@dataclass(frozen=True, slots=True)
class Near:
    """A part in the memory of another process of this machine, and what its slabs are mapped by."""

    maker: int
    placed: Any  # the part, with Placed for each tensor
    slabs: Mapping[int, Any]  # what tells of a slab; empty for those that the reader has mapped


class Kept:
    """Parts of results by the names of their assignments."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._arena = device, Arena(device)
        self._parts: dict[str, tuple[Any, ...]] = {}

    def keep(self, name: str, parts: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The parts with Placed for each tensor, to be told to those who may read them.

        None where they are on the host, or the device has no room for them: they are to be sent.
        """
        devices: set[str] = set()
        mapped(parts, Tensor, lambda tensor: devices.add(tensor.device.type))
        if devices - {self._device.type}:
            self._parts[name] = packed(parts)
            return None
        taken: list[Placed] = []

        def place(tensor: Tensor) -> Placed:
            taken.append(self._arena.place(tensor))
            return taken[-1]

        try:
            placed: tuple[Any, ...] = mapped(parts, Tensor, place)
        except torch.OutOfMemoryError:
            self._arena.free(one.region for one in taken)
            self._parts[name] = packed(parts)
            return None
        self._parts[name] = placed
        return placed

    def part(self, name: str, number: int) -> Any:
        """On this device, in memory of its own: it may be held longer than it is kept here.

        None if it is not here.
        """
        there = mapped(self._there(name, number), Tensor, Tensor.clone)
        return unpacked(there, self._device)

    def packed(self, name: str, number: int) -> Any:
        return packed(self._there(name, number))

    def _there(self, name: str, number: int) -> Any:
        parts = self._parts.get(name)
        return None if parts is None else mapped(parts[number], Placed, self._arena.at)

    def lend(self, slab: int) -> Lent:
        """For one other process, which keeps it mapped."""
        told: Lent = lent(self._arena.slab(slab))
        return told

    def drop(self, name: str) -> None:
        self._arena.free(regions_of(self._parts.pop(name, ())))


class Mapped:
    """Slabs of other processes that this one has mapped."""

    def __init__(self) -> None:
        self._slabs: dict[Slab, Tensor] = {}

    def add(self, maker: int, slab: int, told: Lent) -> None:
        if (maker, slab) not in self._slabs:
            self._slabs[maker, slab] = borrowed(told)

    def forget(self, maker: int) -> None:
        """Let go of a process's memory, which would not be free again before."""
        for slab in [slab for slab in self._slabs if slab[0] == maker]:
            del self._slabs[slab]

    def part(self, near: Near) -> Any:
        """In the other's memory: to be copied before anyone is told that it was read."""
        return mapped(
            near.placed,
            Placed,
            lambda placed: placed.within(self._slabs[near.maker, placed.region.slab]),
        )


def regions_of(placed: Any) -> list[Region]:
    found: list[Region] = []
    mapped(placed, Placed, lambda one: found.append(one.region))
    return found
