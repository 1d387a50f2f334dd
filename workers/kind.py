"""What kind of hardware this is, and how torch must be set for its results to be repeatable."""

import functools
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

_PROBE_WIDTH = 512
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86-64, the last of ARM
_PROBED_DTYPES = (torch.float32, torch.bfloat16)  # float16 is not for the CPU


def present_devices() -> tuple[str, ...]:
    """What torch can compute on here, the fastest first."""
    accelerators = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
    }
    return (*(name for name, there in accelerators.items() if there), "cpu")


def hardware_kind(device: str) -> dict[str, str]:
    """Two machines with equal answers are expected to compute equal bits."""
    kind = {"device": device, "torch": str(torch.__version__), "triton": version_of("triton")}
    kind["bfloat16"] = "native" if _multiplies_bfloat16(device) else "none"
    if device == "cuda":
        kind["name"] = torch.cuda.get_device_name()
        kind["instructions"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        kind["cuda"] = torch.version.cuda or ""
        kind["driver"] = _nvidia_driver()
    elif device == "xpu":
        kind["name"] = torch.xpu.get_device_name()
        kind["driver"] = str(torch.xpu.get_device_properties().driver_version)
    else:
        kind["name"] = _cpu_name()
        kind["instructions"] = torch.backends.cpu.get_cpu_capability()
    return kind


def compute_dtype(kinds: Iterable[dict[str, str]]) -> Literal["float32", "bfloat16"]:
    """What a calibration runs in if nobody says: bfloat16 where all of these multiply in it."""
    native = all(kind.get("bfloat16") == "native" for kind in kinds)
    return "bfloat16" if native else "float32"


def device_count(device: str) -> int:
    if device == "cuda":
        return torch.cuda.device_count()
    if device == "xpu":
        return torch.xpu.device_count()
    return len(os.sched_getaffinity(0))


def cores_beside(device: str) -> int:
    """The cores that fall to each of this machine's accelerators."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, device_count(device)))


@functools.cache
def cpu_flops() -> dict[str, float]:
    """Operations a second of matrix products on one core, by dtype; measured in a moment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = torch.device("cpu")
        return {str(d).removeprefix("torch."): matmul_flops(here, d) for d in _PROBED_DTYPES}
    finally:
        torch.set_num_threads(threads)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product, as wide as keeps the device busy."""
    width = _PROBE_WIDTH if device.type == "cpu" else 16 * _PROBE_WIDTH
    a_II = torch.ones(width, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(8):  # the first one pays for warming up, others for what else runs here
        start = time.perf_counter()
        (a_II @ a_II)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def make_repeatable(threads: int) -> None:
    """Fix what torch would otherwise choose by time, by environment or by chance."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _multiplies_bfloat16(device: str) -> bool:
    """Whether the hardware has products of bfloat16: elsewhere they are slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "xpu":
        return bool(torch.xpu.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in _CPU_BFLOAT16)


def _cpu_name() -> str:
    """As /proc/cpuinfo names it, with family and model: a vendor name alone says too little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in lines[:30]:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    names = [facts.get(key, "") for key in ("model name", "cpu family", "model")]
    return "/".join(names) if any(names) else platform.machine()


def _nvidia_driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
