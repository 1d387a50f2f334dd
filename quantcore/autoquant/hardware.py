"""What kind of hardware this process computes on, as far as torch can tell.

A worker knows more (`workers.kind.hardware_kind`: a CPU's family and model, a GPU's driver), and
its kind is another: hand it over where times and plans are to be shared with workers.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from quantcore.autoquant.measurements import HardwareKind


def hardware_here(device: str) -> HardwareKind:
    """`device` as torch names it: cpu, cuda or xpu."""
    told = {"device": device, "torch": torch.__version__, "triton": _version("triton")}
    if device == "cpu":
        able = torch.cpu.get_capabilities()
        told["name"] = able.get("cpu_name") or platform.processor() or platform.machine()
        told["instructions"] = torch.backends.cpu.get_cpu_capability()
        return HardwareKind.of(told, threads=torch.get_num_threads())
    told["name"] = torch.get_device_module(device).get_device_name()
    return HardwareKind.of(told)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
