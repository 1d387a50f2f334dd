"""Inputs that schemes serve: the same by kernels, compiled, and by a graph that is played again."""

from collections.abc import Callable

import pytest
import torch
from quantkernels import rounding
from torch import Tensor

from quantcore.activations import served_inputs
from quantcore.schemes import Scheme
from tests.roundings import DEVICE, GRIDS, ON_GPU, Codes, kernels, on_nan, random, same

pytestmark = on_nan

SERVED = [
    Scheme(name="int8_dynamic"),
    Scheme(name="int8_static"),
    Scheme(name="int8_dynamic_int4", group_size=32),
    Scheme(name="float8_dynamic"),
    Scheme(name="float8_dynamic", per_tensor=True),
    Scheme(name="float8_static"),
]


def served(x_TI: Tensor, scheme: Scheme) -> Codes:
    found = served_inputs(x_TI, scheme, 0.03 if scheme.static else None)
    return found.codes_TI, found.scale, found.zero


@kernels
@pytest.mark.parametrize("scheme", SERVED, ids=Scheme.label)
def test_a_served_input_is_the_same_by_kernels_and_compiled(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "float8" if scheme.name.startswith("float8") else "int8"
    inputs = [random(tokens, 64, dtype=torch.float16, seed=tokens) for tokens in (5, 9)]
    wanted = [served(x_TI.cpu(), scheme) for x_TI in inputs]
    monkeypatch.setattr(rounding, "FUSED_DEVICES", (DEVICE,))
    torch._dynamo.reset()
    compiled: Callable[..., Codes] = torch.compile(
        served, fullgraph=True, dynamic=True, backend="inductor" if ON_GPU else "aot_eager"
    )
    for x_TI, theirs in zip(inputs, wanted, strict=True):
        for ours in (served(x_TI, scheme), compiled(x_TI, scheme)):
            on_cpu = (ours[0].cpu(), ours[1].cpu(), ours[2].cpu())
            assert same(on_cpu, theirs, GRIDS[name])
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SERVED, ids=Scheme.label)
@pytest.mark.parametrize("tokens", [1, 300])
def test_nothing_waits_and_a_graph_plays_it_again(scheme: Scheme, tokens: int) -> None:
    grid = GRIDS["float8" if scheme.name.startswith("float8") else "int8"]
    x_TI = random(tokens, 4096, dtype=torch.bfloat16)
    served(x_TI, scheme)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses what waits
        found = served(x_TI, scheme)
    other_TI = random(tokens, 4096, dtype=torch.bfloat16, seed=1) * 5
    x_TI.copy_(other_TI)
    graph.replay()
    assert same(found, served(other_TI, scheme), grid)
