"""What one machine offers a job, and what it sees of the paths that the job names."""

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from workers.kind import device_count, hardware_kind, present_devices

_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    name: str
    kinds: dict[str, dict[str, str]]  # by device ('cpu', 'cuda', 'xpu'): see kind.py
    devices: dict[str, int]  # how many of each; of 'cpu', the cores
    memory_free: int  # bytes of host memory
    paths: dict[str, str | None]  # by path: a fingerprint of what is there, None for nothing
    node_id: str = ""  # a cluster's name for it


def look(paths: Iterable[str]) -> Machine:
    """This machine, as a job would find it."""
    devices = present_devices()
    return Machine(
        name=platform.node(),
        kinds={device: hardware_kind(device) for device in devices},
        devices={device: device_count(device) for device in devices},
        memory_free=psutil.virtual_memory().available,
        paths={path: _fingerprint(Path(path)) for path in paths},
    )


def _fingerprint(path: Path) -> str | None:
    """The same for the same file or folder; a file's ends stand for its whole."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        parts = [(file.name, file.stat().st_size) for file in files]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    if not path.is_file():
        return None
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
