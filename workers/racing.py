"""Times of candidates on the device of a worker, as it would serve and not as it calibrates.

A worker's torch is set for the same bits each time (kind.py). That and its threads are put aside
while candidates race, and back after it.
"""

import contextlib
from collections.abc import Iterator

import torch

from quantcore.autoquant.costs import measured
from quantcore.autoquant.measurements import HardwareKind, Product, Timing
from quantcore.autoquant.timing import Bench
from quantcore.errors import ResourceError
from workers.kind import hardware_kind
from workers.tasks import Race


def race(device: torch.device, task: Race) -> dict[Product, Timing]:
    """What was not known. Raises ResourceError where this is not the kind that was asked."""
    with as_served(device, task.hardware):
        _, new = measured(task.spots, task.factors, task.known, Bench(device.type), task.effort)
    return new


@contextlib.contextmanager
def as_served(device: torch.device, asked: HardwareKind) -> Iterator[None]:
    """Raises ResourceError where this is not the kind that was asked."""
    here = HardwareKind.of(hardware_kind(device.type), threads=asked.threads)
    if here != asked:
        raise ResourceError(
            f"times were asked of {asked.label()}, and this is {here.label()}: start workers with "
            "the quantfleet and torch of the command"
        )
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(asked.threads or before[0])
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
