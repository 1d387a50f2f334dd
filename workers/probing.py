"""A block tried out before a job begins: how long it takes here, and how much memory.

A few chunks of the texts go through the block, whatever its place in the model, and its widest
LinearGroup is solved from what they gave: the shapes are the job's, the numbers do not matter.
Nothing is kept, and nothing goes to the store.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from workers.blocks import BlockModel, run_block
from workers.capacity import peak_bytes
from workers.clock import Clock
from workers.collecting import Collector
from workers.held import Held
from workers.plan import Plan
from workers.solving import solve_group
from workers.statistics import whole
from workers.tasks import BandMoments, InputRanges, Probe, Solve


def probe_block(plan: Plan, model: BlockModel, task: Probe) -> dict[str, Any]:
    """Seconds and peaks of bytes, by step; `device_room` is what torch can have of the device."""
    device = model.device
    clock = Clock(device)  # measures nothing outside a task; here a step's device is waited for
    seconds: dict[str, float] = {}
    peaks: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def measured(step: str) -> Iterator[None]:
        _forget_peaks(device)
        start = time.perf_counter()
        yield
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds[step] = time.perf_counter() - start
        peaks[step] = peak_bytes(device)

    held = Held(plan, model)
    groups = plan.blocks[task.block].groups
    with measured("embed"):
        held.embed(task.chunks)
    with measured("load"):
        block = model.block(task.block)
    prefix = model.prefix(task.block)
    collector = Collector(block, prefix, plan, task.block, device, clock)
    with measured("collect"):
        for chunk in task.chunks:
            collector.run(chunk, held.at(chunk, 0))
        parts = collector.parts((1,) * len(groups))
    del collector
    block = model.block(task.block)  # without the hooks
    with measured("advance"):
        for chunk in task.chunks:
            for inputs in held.at(chunk, 0):
                run_block(block, inputs.calls[task.block], inputs.hidden_BLH)
    del block
    solve = Solve(task.block, task.group, task.tiles)
    owners = [number for number, group in enumerate(groups) if plan.summed(group)]
    owners += [number for number, group in enumerate(groups) if plan.ranged(group)]
    collected = [p for p, number in zip(parts, owners, strict=True) if number == task.group]
    del parts
    with measured("solve"):
        chunks = plan.contract.chunks
        known = whole((_as_if_all(part, chunks) for part in collected), chunks, device)
        solved = solve_group(plan, solve, known, model.source, device, clock)
    room = None
    if device.type != "cpu":
        part: Any = getattr(torch, device.type)
        room = int(part.mem_get_info(device)[0] + part.memory_reserved(device))
    fallback = solved.facts.get("fallback")
    return {"seconds": seconds, "peaks": peaks, "device_room": room, "fallback": fallback}


def _as_if_all(part: BandMoments | InputRanges, chunks: int) -> BandMoments | InputRanges:
    """What a few chunks came to in the place of what all come to."""
    if isinstance(part, BandMoments):
        (sums,) = part.nodes.values()
        return BandMoments(part.first_row, {(0, chunks): sums})
    (ranges,) = part.nodes.values()
    return InputRanges({(0, chunks): ranges})


def _forget_peaks(device: torch.device) -> None:
    """So that each step's peak is its own, where the system allows it; else it is all so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats(device)
