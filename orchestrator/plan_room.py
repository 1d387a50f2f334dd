"""Where a plan's finalists run end to end: how, and whether a worker has the memory for them.

The whole model lies there, and the linears of each finalist beside it. There must be room for those
of two, as large as dense ones: the chosen plan's and the dense model's, whose linears are joined.
Uniform plans near the chosen one run as far as there is room for theirs (plan_proving.py).
"""

import math
from dataclasses import dataclass

from jobs.spec import JobSpec
from orchestrator.checks import Prepared
from orchestrator.fitting import Admitted
from orchestrator.machines import Chosen
from orchestrator.phases import whole_model
from orchestrator.sizes import Sizes, weights_of
from orchestrator.units import gib
from quantcore.autoquant.finalists import MOST
from quantcore.autoquant.options import Profile
from quantcore.errors import ResourceError

_CACHE_TOKENS = 512  # of each sequence that decodes
_LEAST_CACHE = 8


@dataclass(frozen=True, slots=True)
class Stand:
    """How a kind of hardware runs whole models."""

    cache_tokens: int  # of a step, for each sequence
    longest: int  # tokens of a prompt's sequence
    room: float  # bytes for linears under plans


def stand_of(
    spec: JobSpec, prepared: Prepared, chosen: Chosen, admitted: Admitted, profile: Profile
) -> Stand | str:
    """Why there is none, where a job that leaves it open has none; '' where it wants none.

    Raises ResourceError where the job asks for it and there is no room.
    """
    planning = spec.quantization.planning
    if not planning.end_to_end:
        return ""
    if planning.least != "time":
        return "nothing runs end to end: plans that run are told apart by time, and not by error"
    longest = prepared.architecture.max_length or max(profile.calls)
    cache_tokens = max(_LEAST_CACHE, min(_CACHE_TOKENS, longest))
    if profile.name == "recorded" and prepared.plan.calibration is not None:
        longest = prepared.plan.calibration.length
    sizes = Sizes(prepared.spec, prepared.plan, prepared.architecture, prepared.source, 1)
    needs = whole_model(sizes, profile.calls, cache_tokens, MOST)
    read, run = (sum(needs[phase].values()) for phase in ("read", "run"))
    two = 2 * sizes.item * sum(weights_of(block) for block in prepared.plan.blocks)
    host = _host_bytes(spec, admitted)
    free = host if chosen.device == "cpu" else _device_bytes(chosen, admitted)
    if read <= host and run + two <= free:
        return Stand(cache_tokens, longest, free - run)
    lacking = (
        f"a worker reads a whole model in {gib(read)} and has {gib(host)}"
        if read > host
        else f"a whole model and its linears under two plans take {gib(run + two)}, and a worker "
        f"has {gib(int(free))}"
    )
    if planning.end_to_end == "auto":
        return f"nothing runs end to end on {chosen.kind['name']}: {lacking}: times are predictions"
    raise ResourceError(
        f"quantization.plan.end_to_end: {lacking}: write false, and plan by predictions"
    )


def _host_bytes(spec: JobSpec, admitted: Admitted) -> int:
    allowed = spec.workers.memory_bytes()
    return admitted.room if allowed is None else min(allowed, admitted.room)


def _device_bytes(chosen: Chosen, admitted: Admitted) -> float:
    """Of those that are used the one with the least; what is not known is not held against it."""
    count = admitted.prediction.workers
    free = [
        sorted(machine.device_free.get(chosen.device, ()), reverse=True)[:count]
        for machine in chosen.machines
    ]
    return min((least for of in free for least in of), default=math.inf)
