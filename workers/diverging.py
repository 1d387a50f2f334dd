"""How far a whole model's predictions move, where it fits on one worker (quantcore/autoquant).

The model is loaded dense, in the dtype that it is planned in, and made each variant in turn: some
linears by name, each with its scheme, rounded plainly. What is known of a variant is written.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from quantcore.autoquant.divergence import HeldOut, undone
from quantcore.quantize import quantize_
from quantcore.recorder import InputStatistics, Recorder
from quantcore.schemes import Scheme
from workers.plan import Plan
from workers.sensed import keep_divergence, open_errors
from workers.sensing import kept, sequences
from workers.sources import ModelSource
from workers.store import STORE_PATIENCE_S
from workers.tasks import Diverge
from workers.variants import original


@torch.no_grad()
def diverge(
    plan: Plan,
    source: ModelSource,
    device: torch.device,
    task: Diverge,
    tell: Callable[[int, int], None],
) -> dict[str, float]:
    """By variant, nats a token."""
    model = original(source, plan.torch_dtype).to(device)
    held_out = HeldOut(model, [torch.tensor(ids, device=device)[None] for ids in task.held_out])
    store = open_errors(task.store, task.key, patience_s=STORE_PATIENCE_S)
    static = {
        name
        for schemes in task.variants.values()
        for name, scheme in schemes.items()
        if scheme.static
    }
    recorder = recorded(model, plan, static, device) if static else None
    found = {}
    for number, (variant, schemes) in enumerate(task.variants.items(), start=1):
        with undone(model, schemes):
            for scheme in dict.fromkeys(schemes.values()):
                quantize_(
                    model,
                    scheme,
                    partial(_has, schemes, scheme),
                    recorder=recorder if scheme.static else None,
                    inductor_settings=False,
                )
            found[variant] = held_out.divergence()
        keep_divergence(store, variant, found[variant])
        tell(number, len(task.variants))
    return found


def _has(schemes: dict[str, Scheme], scheme: Scheme, name: str, _module: nn.Module) -> bool:
    return schemes.get(name) == scheme


def recorded(
    model: nn.Module, plan: Plan, linears: set[str], device: torch.device
) -> Mapping[str, InputStatistics]:
    """What static schemes find their scales in."""
    if plan.statistics:
        each = (of for index in range(len(plan.blocks)) for of in kept(plan, index, device))
        return {name: of for of in each for name in of.linears}
    recorder = Recorder(model, lambda name, _: name in linears, moments=False)
    with recorder:
        for ids_BL in sequences(plan):
            real_BL = ids_BL >= 0
            with recorder.only(real_BL.to(device)):
                model(ids_BL.clamp(min=0).to(device))
    return recorder
