"""Where hidden states wait between blocks: on the device, in the host's memory, or on disk.

What runs short of memory moves everything one place down, and what is put there later as well.
The bytes stay the same.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor


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
        """The same values, where they are to wait."""
        match self.place:
            case "device":
                return hidden_BLH
            case "host":
                return hidden_BLH.cpu()
            case _:
                return _on_disk(hidden_BLH)

    def get(self, kept_BLH: Tensor) -> Tensor:
        return kept_BLH.to(self._device)


def _on_disk(hidden_BLH: Tensor) -> Tensor:
    """A tensor over a file, which the system writes back and reads again as memory allows.

    The file has no name any more once it is mapped: it goes with the tensor, or with the process.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        path = Path(scratch) / "hidden"
        mapped = torch.from_file(
            str(path), shared=True, size=hidden_BLH.numel(), dtype=hidden_BLH.dtype
        )
    mapped.copy_(hidden_BLH.flatten())
    return mapped.view(hidden_BLH.shape)
