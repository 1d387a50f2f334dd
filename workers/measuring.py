"""The tasks of `quantfleet plan`, each in a file of its own."""

from collections.abc import Callable
from typing import Any

from torch import nn

from workers.blocks import BlockModel
from workers.diverging import diverge
from workers.plan import Plan
from workers.proving import prove
from workers.racing import race
from workers.sensing import sense
from workers.tasks import Diverge, Prove, Race, Sense


def measure(
    plan: Plan,
    model: BlockModel,
    block_at: Callable[[int], nn.Module],
    task: Sense | Diverge | Race | Prove,
    tell: Callable[[int, int], None],
) -> dict[str, Any]:
    """The task's summary. `block_at` gives a block with its weights."""
    match task:
        case Sense():
            sense(plan, model, block_at, task, tell)
            return {}
        case Diverge():
            return {"divergences": diverge(plan, model.source, model.device, task, tell)}
        case Race():
            return {"timings": race(model.device, task)}
        case Prove():
            return {"ends": prove(plan, model.source, model.device, task)}
