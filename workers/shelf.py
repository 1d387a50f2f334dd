"""Where hidden states wait between blocks: on the device, in the host's memory, or on disk.

What runs short of memory moves everything one place down, and what is put there later as well; then
the task is done again. A worker for which that is not enough counts as lost, since a fresh process,
perhaps elsewhere, may have room. The bytes stay the same. What waits elsewhere than on its
accelerator comes and goes while that computes (transfers.py).
"""

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.transfers import Coming, Transfers


def places(device: str) -> list[str]:
    """Where a worker on a device can keep hidden states, the nearest first."""
    return ["host", "disk"] if device == "cpu" else ["device", "host", "disk"]


class Shelf:
    """`first` is the place to begin with, if not the nearest."""

    def __init__(self, device: torch.device, first: str = "") -> None:
        self._device = device
        self._places = places(device.type)
        if first:
            del self._places[: self._places.index(first)]
        self._coming: Coming | None = None

    @property
    def place(self) -> str:
        return self._places[0]

    def lower(self) -> bool:
        """One place down from now on; False if there is none."""
        if len(self._places) == 1:
            return False
        del self._places[0]
        return True

    def put(self, hidden_BLH: Tensor) -> Tensor:
        """The same values, where they are to wait; before others than `get` read them: `settle`."""
        if self.place == "device" or (self.place == "host" and hidden_BLH.device.type == "cpu"):
            return hidden_BLH
        kept_BLH = _in_memory(hidden_BLH) if self.place == "host" else _on_disk(hidden_BLH)
        if hidden_BLH.device.type == "cpu":
            kept_BLH.copy_(hidden_BLH)
        else:
            self._transfers.send(hidden_BLH, kept_BLH)
        return kept_BLH

    def get(self, kept_BLH: Tensor, later_BLH: Tensor | None = None) -> Tensor:
        """The same values on the device, and those that are wanted next on their way there."""
        if kept_BLH.device.type == self._device.type:
            return kept_BLH
        coming, self._coming = self._coming, None
        if coming is not None:
            hidden_BLH = coming.wait()  # unwanted as well: its memory must not change any more
        if coming is None or coming.kept is not kept_BLH:
            hidden_BLH = self._transfers.fetch(kept_BLH).wait()
        if later_BLH is not None and later_BLH.device.type == "cpu":
            self._coming = self._transfers.fetch(later_BLH)
        return hidden_BLH

    def settle(self) -> None:
        """Nothing is on its way any more."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None
        if "_transfers" in self.__dict__:
            self._transfers.settle()

    @cached_property
    def _transfers(self) -> Transfers:
        return Transfers(self._device)


def _in_memory(hidden_BLH: Tensor) -> Tensor:
    """Room for the same values: numpy's, since torch may be told to fill its own first."""
    flat = torch.from_numpy(np.empty(hidden_BLH.nbytes, dtype=np.uint8))
    return flat.view(hidden_BLH.dtype).view(hidden_BLH.shape)


def _on_disk(hidden_BLH: Tensor) -> Tensor:
    """Room over a file, which the system writes back and reads again as memory allows.

    The file has no name any more once it is mapped: it goes with the tensor, or with the process.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        path = Path(scratch) / "hidden"
        mapped = torch.from_file(
            str(path), shared=True, size=hidden_BLH.numel(), dtype=hidden_BLH.dtype
        )
    return mapped.view(hidden_BLH.shape)
