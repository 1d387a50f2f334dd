"""How long a choice and a front take for a model of 8B: 225 linears, 12 candidates each.

    python -m tests.benchmarks.plan_choice

No hardware is timed: costs are made up from the shapes of Llama-3.1-8B, bits read at 4 TB/s with
candidates' own overheads, errors that fall by 4 for each bit and differ from layer to layer.
"""

import random
import time

from quantcore.autoquant.candidates import DENSE, Candidate, candidate_of
from quantcore.autoquant.choice import Budgets, choose
from quantcore.autoquant.front import front
from quantcore.autoquant.options import Layer, Option, Time

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
BYTES_PER_US = 4e6

# label: bits a weight, overhead in microseconds
CANDIDATES: dict[str, tuple[float, float]] = {
    "dense": (16, 2.0),
    "int8 sym channel triton_tiled": (8.01, 2.6),
    "int8_dynamic sym channel plain": (8.01, 9.0),
    "float8 channel triton_tiled": (8.02, 2.5),
    "float8_dynamic channel plain": (8.01, 8.0),
    "float8_dynamic tensor plain": (8.0, 7.5),
    "int4 sym g32 triton_tiled": (5.0, 2.8),
    "int4 sym g64 triton_tiled": (4.5, 2.7),
    "int4 sym g128 triton_tiled": (4.25, 2.7),
    "int4 asym g32 triton_tiled": (6.0, 3.1),
    "int4 asym g64 triton_tiled": (5.01, 2.9),
    "int4 asym g128 triton_tiled": (4.5, 2.9),
}


def model(noise: float, seed: int = 0) -> list[Layer]:
    """Times are those of a shape, as measured once; errors are a layer's own."""
    draw = random.Random(seed)
    shapes = {
        f"model.layers.{block}.{name}": of for block in range(32) for name, of in SHAPES.items()
    }
    shapes["lm_head"] = (128256, 4096)
    times: dict[tuple[str, tuple[int, int]], float] = {}
    layers = []
    for name, shape in shapes.items():
        options = []
        hard = draw.lognormvariate(0, 0.8)
        for label, (bits, overhead_us) in CANDIDATES.items():
            num_bytes = shape[0] * shape[1] * bits / 8
            key = (label, shape)
            if key not in times:
                times[key] = num_bytes / BYTES_PER_US * draw.uniform(1, 1.1) + overhead_us
            candidate = candidate_of(label)
            options.append(
                Option(
                    candidate=candidate,
                    time=Time(
                        time_us=times[key],
                        low_us=times[key] * (1 - noise),
                        high_us=times[key] * (1 + noise),
                    ),
                    num_bytes=round(num_bytes),
                    error=_error(candidate, bits, hard, draw),
                )
            )
        layers.append(Layer(name=name, linears=(name,), options=tuple(options)))
    return layers


def _error(candidate: Candidate, bits: float, hard: float, draw: random.Random) -> float:
    if candidate == DENSE:
        return 0.0
    activations = candidate.scheme is not None and candidate.scheme.activations is not None
    return hard * draw.lognormvariate(0, 0.1) * (4.0**-bits * 4 + 2e-5 * activations)


def main() -> None:
    for noise in (0.0, 0.01):
        layers = model(noise)
        began = time.perf_counter()
        points = front(layers)
        front_s = time.perf_counter() - began
        errors = [point.totals.error for point in points]
        choices_s = []
        for at in (1, len(points) // 2, len(points) - 2):
            for objective in ("time", "error"):
                budgets = (
                    Budgets(error=errors[at], num_bytes=16e9)
                    if objective == "time"
                    else Budgets(time_us=points[at].totals.time_us * 1.001, num_bytes=16e9)
                )
                began = time.perf_counter()
                choose(layers, objective, budgets)
                choices_s.append(time.perf_counter() - began)
        print(
            f"noise {noise:.0%}: {len(layers)} linears of {len(CANDIDATES)} candidates: a "
            f"choice takes {min(choices_s):.2f} to {max(choices_s):.2f} s, a front of "
            f"{len(points)} points {front_s:.1f} s"
        )


if __name__ == "__main__":
    main()
