"""What there is room for here: host memory as far as cgroups allow, /dev/shm, disk, devices.

A container sees the whole machine's memory in /proc/meminfo and is killed at its cgroup's limit, so
every cgroup on the way up is asked, in version 1 and in version 2.
"""

import ctypes
import hashlib
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_ROOT = Path("/")
_SHARED = Path("dev/shm")


@dataclass(frozen=True, slots=True)
class Limit:
    """What one cgroup leaves of its memory, and which one it is."""

    free: int
    inode: int  # the same for all who are under it, whatever path they see it at


def memory_free(root: Path = _ROOT) -> int:
    """Bytes of host memory that processes of ours can still have."""
    limits = [limit.free for limit in cgroup_limits(root)]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def host_identity(root: Path = _ROOT) -> str:
    """The same for all who draw on the same memory: by the boot, and by the cgroup that binds.

    Containers of one host that have limits of their own are told apart; those without are not.
    """
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    least = min(cgroup_limits(root), key=lambda limit: limit.free, default=None)
    bound = least is not None and least.free < psutil.virtual_memory().available
    name = f"{boot}/{least.inode}" if least is not None and bound else boot
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def cgroup_limits(root: Path = _ROOT) -> Iterator[Limit]:
    """Every memory limit above this process."""
    for folder, top in _memory_cgroups(root):
        while True:
            limit = _version_2(folder) or _version_1(folder)
            if limit is not None:
                yield limit
            if folder == top:
                break
            folder = folder.parent  # noqa: PLW2901 - walks up


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, Path]]:
    """This process's cgroups that count memory, each with the top of its hierarchy."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        tops = []
        if "memory" in controllers.split(","):
            tops = [mounts / "memory"]
        elif number == "0" and not controllers:
            tops = [mounts, mounts / "unified"]
        for top in tops:
            own = top / path.lstrip("/")
            # a container may be shown its host's path and, at the top, its own cgroup
            inside = ".." not in own.parts and own.is_dir()
            if top.is_dir():
                yield (own if inside else top), top


def _version_2(folder: Path) -> Limit | None:
    return _limit(folder, "memory.max", "memory.current", "inactive_file")


def _version_1(folder: Path) -> Limit | None:
    usage = "memory.usage_in_bytes"
    return _limit(folder, "memory.limit_in_bytes", usage, "total_inactive_file")


def _limit(folder: Path, limit: str, usage: str, cache: str) -> Limit | None:
    """A cgroup's limit less its use; pages of files that nobody uses are given up on demand."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
        if most == "max":
            return None
        cached = {key: int(value) for key, value in (line.split() for line in stat)}.get(cache, 0)
        return Limit(int(most) - used + cached, folder.stat().st_ino)
    except (OSError, ValueError):
        return None


def shared_memory(root: Path = _ROOT) -> tuple[int, int] | None:
    """Size and free bytes of /dev/shm, where Ray keeps its objects; None if there is none."""
    try:
        usage = shutil.disk_usage(root / _SHARED)
    except OSError:
        return None
    return usage.total, usage.free


@dataclass(frozen=True, slots=True)
class Disk:
    free: int
    device: int  # two folders of one file system share what is free


def disk(folder: Path) -> Disk:
    """The file system that a folder is in, or will be in once it is made."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return Disk(shutil.disk_usage(folder).free, folder.stat().st_dev)


def device_memory_free(device: str, count: int) -> tuple[int, ...]:
    """Free bytes of each device; of a CUDA device without making a context on it.

    A context takes half a gigabyte and, on a device in exclusive mode, the place of the worker.
    """
    if device == "cuda":
        devices = [torch.cuda.get_device_properties(number) for number in range(count)]
        seen = [_nvml_free(str(properties.uuid)) for properties in devices]
        totals = [int(properties.total_memory) for properties in devices]
        return tuple(
            total if free is None else min(free, total)
            for free, total in zip(seen, totals, strict=True)
        )
    if device == "xpu":
        return tuple(_xpu_free(number) for number in range(count))
    return ()


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had so far: on the host, and of torch's on a device."""
    peak = {"host": _host_peak()}
    if device.type != "cpu":
        peak["device"] = int(getattr(torch, device.type).max_memory_allocated(device))
    return peak


def _host_peak() -> int:
    """Resident bytes. Linux keeps the peak of who started the process in ru_maxrss: not in here."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    kilobytes = next(found, None)
    if kilobytes is not None:
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _xpu_free(number: int) -> int:
    try:
        return int(torch.xpu.mem_get_info(number)[0])
    except RuntimeError:  # some drivers do not tell
        return int(torch.xpu.get_device_properties(number).total_memory)


class _NvmlMemory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _nvml_free(uuid: str) -> int | None:
    """What the driver's own library says of a device; None where it is not to be had."""
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        for name in (f"GPU-{uuid}", f"MIG-{uuid}", uuid):
            if nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) == 0:
                if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
                    return int(memory.free)
                return None
    finally:
        nvml.nvmlShutdown()
    return None
