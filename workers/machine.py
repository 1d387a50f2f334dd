"""What one machine offers a job, and what it sees of the paths that the job names."""

import hashlib
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from workers.capacity import (
    Disk,
    device_memory_free,
    disk,
    host_identity,
    memory_free,
    shared_memory,
)
from workers.kind import cpu_flops, device_count, hardware_kind, present_devices

_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One Ray node, or the machine that a command runs on. None stands for what is not known."""

    name: str
    kinds: dict[str, dict[str, str]]  # by device ('cpu', 'cuda', 'xpu'): see kind.py
    devices: dict[str, int]  # how many of each; of 'cpu', the cores
    memory_free: int  # bytes of host memory, within the limits of cgroups
    paths: dict[str, str | None]  # by path: a fingerprint of what is there, None for nothing
    node_id: str = ""  # a cluster's name for it
    host: str = ""  # the same for all who draw on the same memory; '' for one by itself
    shared_size: int | None = None  # of /dev/shm
    shared_free: int | None = None
    scratch: Disk | None = None  # where temporary files go
    device_free: dict[str, tuple[int, ...]] = field(default_factory=dict)  # bytes of each device
    flops: dict[str, float] = field(default_factory=dict)  # a second, of one core, by dtype
    object_store: int | None = None  # bytes that Ray keeps objects in, where it runs already


def look(paths: Iterable[str]) -> Machine:
    """This machine, as a job would find it."""
    devices = {device: device_count(device) for device in present_devices()}
    shared = shared_memory()
    return Machine(
        name=platform.node(),
        kinds={device: hardware_kind(device) for device in devices},
        devices=devices,
        memory_free=memory_free(),
        paths={path: _fingerprint(Path(path)) for path in paths},
        host=host_identity(),
        shared_size=shared and shared[0],
        shared_free=shared and shared[1],
        scratch=disk(Path(tempfile.gettempdir())),
        device_free={d: device_memory_free(d, n) for d, n in devices.items() if d != "cpu"},
        flops=cpu_flops(),
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
