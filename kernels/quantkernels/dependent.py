"""Kernels that start while the one before ends: programmatic dependent launches, on Hopper.

Between two kernels of a stream a GPU is idle: the first one's last programs end, what they wrote is
flushed, the next one's programs are sent out, and make their indices. A kernel that is launched as
a dependent one (CUDA programming guide, "Programmatic Dependent Launch") is sent out as soon as
every program of the kernel before has said that it may be, or has ended; then it waits by itself:

    fetch     of products of bytes: their weight's first are asked for, to the L2 cache
    wait      until all of the kernel before has ended, and what it wrote can be seen
    ...       the kernel as it always was
    release   the kernel after this one may be sent out

A kernel's programs stay where they were put, and they are put where there is room. Sent out while
most of the GPU is taken, they crowd on the few multiprocessors that have room, or get it first, and
when their turn comes the others are idle: with the release at the beginning, a product of 23 us
took 30 on one H100. So a product releases when all that is left is to write, and a kernel of few
programs, which leave room everywhere, at once after its wait; others do by ending.

Why results are those of kernels one after another:

1. Every program of every kernel that is launched so waits, on no condition, before it reads or
   writes memory. What comes before is arithmetic on the kernel's arguments, and the fetch.
2. So such a kernel does not end before the one before it has. When it goes on, all kernels before
   it in the stream have ended, by induction, also where several were sent out that only waited. An
   ordinary kernel before it, which says nothing, counts as ready when its programs have ended; the
   wait is for what they wrote. An ordinary kernel, a copy or an event after it waits for the whole
   of it, and so for all before. Streams wait for each other by events. Kernels of others that are
   launched as dependent ones, as some of cuBLAS are, have to keep this promise themselves.
3. All that is written (results, sums of spans, counters of arrivals, which a tile's last program
   sets back to 0) is written after the wait. So memory is not written that an earlier kernel still
   reads, as where the allocator hands it on within a stream; and counters that launches of a stream
   share (arrivals.py) are at 0 when the next one comes to them.
4. The fetch alone comes before. It moves lines to the L2 cache, through which the whole GPU reads
   and writes. Of a weight that the kernel before is still writing, the cache has the newest bytes
   when they are read; a register, or a line of L1, that was filled before the wait would not. The
   bytes lie within tensors that are alive when the kernel is launched.
5. None waits in a circle: a kernel is sent out when all programs of the one before have released
   it, or have ended, so that none takes the place of one that it waits for.

A CUDA graph that is captured keeps such launches as edges of their own kind, from CUDA 12.3 on.
QUANTFLEET_DEPENDENT=0 has every kernel launched as an ordinary one.
"""

import ctypes
import math
import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from quantkernels.devices import capability

VARIABLE = "QUANTFLEET_DEPENDENT"
CAPTURING = 12_030  # the first driver, CUDA 12.3's, that captures such launches into graphs
FEW = 32  # programs of a kernel, beside which all of the next one's have room

_LAUNCHED: dict[str, Any] = {"LATER": True, "launch_pdl": True}
_ORDINARY: dict[str, Any] = {"LATER": False}


def later(device: torch.device) -> dict[str, Any]:
    """How a kernel that knows of it is launched on a device; on "meta", compiled."""
    return _LAUNCHED if asked() and _able(device) else _ORDINARY


def later_than_few(device: torch.device, *grid: int) -> dict[str, Any]:
    """The same of a kernel that is no product, and of how many programs it has."""
    launched = later(device)
    return launched | {"EARLY": launched["LATER"] and math.prod(grid) <= FEW}


@cache
def asked() -> bool:
    text = os.environ.get(VARIABLE, "1")
    if text not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is {text!r}: write 0 or 1")
    return text == "1"


@cache
def _able(device: torch.device) -> bool:
    ours = device.type in ("cuda", "meta") and torch.version.hip is None
    return ours and capability(device) >= (9, 0) and _driver() >= CAPTURING


def _driver() -> int:
    """The CUDA that the GPU's driver knows; where there is none, one that will do."""
    if not torch.cuda.is_available():
        return CAPTURING
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


@triton.jit
def wait(LATER: tl.constexpr):
    if LATER:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def release(NOW: tl.constexpr):
    if NOW:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1
        )
