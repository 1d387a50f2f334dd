"""A whole model run end to end under a few plans, by turns (quantcore/autoquant/finalists.py).

It is loaded dense, in the dtype that it is planned in. On a GPU norms and the like are those of our
forward (fusing.py), and calls are replays of CUDA graphs; on a CPU they are eager. Weights are
rounded plainly: how they come to their codes changes no time.
"""

import gc
from collections.abc import Callable, Mapping
from functools import partial

import torch
from quantkernels.arrivals import apart
from torch import nn

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.finalists import Stage
from quantcore.autoquant.measurements import Timing
from quantcore.joining import joinable
from workers.decoding import call, is_step
from workers.diverging import recorded
from workers.fusing import fuse
from workers.plan import Plan
from workers.racing import as_served
from workers.sources import ModelSource
from workers.tasks import Prove
from workers.variants import original

_STEPS = 4  # one after another: what begins and ends them does not show in as many


def prove(plan: Plan, source: ModelSource, device: torch.device, task: Prove) -> list[Timing]:
    """Of each plan, all calls of the profile. Raises ResourceError where this is another kind."""
    try:
        with as_served(device, task.hardware), torch.no_grad(), apart():
            return _stage(plan, source, device, task).timed_as(task.plans)
    finally:
        gc.collect()  # graphs and caches are held in cycles
        if device.type != "cpu":
            torch.accelerator.empty_cache()


def _stage(plan: Plan, source: ModelSource, device: torch.device, task: Prove) -> Stage:
    model = original(source, plan.torch_dtype).to(device)
    if device.type != "cpu" and plan.torch_dtype != torch.float32:
        fuse(model)
    static = {
        linear
        for labels in task.plans
        for layer, linears in task.layers.items()
        for linear in linears
        if (scheme := candidate_of(labels[layer]).scheme) is not None and scheme.static
    }
    in_a_row = {tokens: _STEPS if is_step(tokens) else 1 for tokens in task.calls}
    return Stage(
        model=model,
        layers=task.layers,
        joined=[names for names in joinable(model) if names in task.layers.values()],
        recorder=recorded(model, plan, static, device) if static else None,
        prepare=partial(_prepared, task, in_a_row),
        calls={tokens: times / in_a_row[tokens] for tokens, times in task.calls.items()},
        effort=task.effort,
    )


def _prepared(
    task: Prove, in_a_row: Mapping[int, int], model: nn.Module
) -> dict[int, Callable[[], object]]:
    calls = {of: call(model, of, task.cache_tokens, task.longest) for of in in_a_row}
    return {of: partial(_repeated, calls[of], times) for of, times in in_a_row.items()}


def _repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()
