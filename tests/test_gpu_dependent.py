"""Dependent launches on a Hopper GPU: the bits of ordinary ones. Run with: pytest -m gpu

Each case runs both ways, many times over, on weights that lie outside the cache as well as within.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from quantkernels import forward
from quantkernels.launches import Launch
from quantkernels.rounding.reference import InputGrid
from quantkernels.w8a8 import Weight8
from quantkernels.weight_only.tiles import Tiles, pack_codes, pack_groups
from torch import Tensor

dependent = pytest.importorskip("quantkernels.dependent")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="kernels wait for each other from Hopper on",
    ),
]

WIDTH, HIDDEN, BLOCKS, TIMES = 2048, 4096, 6, 50
SPLIT = Launch(rows=64, tokens=8, split=8, turn=128, stages=4, warps=2)
WHOLE = Launch(rows=32, tokens=16, split=1, turn=256, stages=3, warps=2)
MANY = Launch(
    rows=128, tokens=64, split=3, turn=128, stages=3, warps=4, early=True, overlapped=True
)
Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    dependent.asked.cache_clear()


def asking(monkeypatch: pytest.MonkeyPatch, *, later: bool) -> None:
    monkeypatch.setenv(dependent.VARIABLE, "1" if later else "0")
    dependent.asked.cache_clear()
    assert dependent.later(torch.device("cuda", 0))["LATER"] == later


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def codes(rows: int, columns: int, half: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (rows, columns)
    return torch.randint(-half, half, size, generator=generator, device="cuda", dtype=torch.int8)


def tiles(rows: int, columns: int, seed: int) -> Tiles:
    scale_OG = (random(rows, columns // 128, seed=seed).abs() + 0.5) * columns**-0.5 / 8
    return Tiles(
        codes_RPBW=pack_codes(codes(rows, columns, 8, seed), "int4"),
        scale=pack_groups(scale_OG, columns, 128),
        zero=None,
        kind="int4",
        grid="affine",
        group=128,
        features=(rows, columns),
    )


def product(x_TI: Tensor, weight: Tiles, launch: Launch) -> Tensor:
    from quantkernels.weight_only import fused

    return fused.linear(x_TI, weight, None, launch)


def block(seed: int) -> Step:
    """norm -> product -> silu -> round -> product of bytes -> rotation -> product, and a sum."""
    from quantkernels.rounding import fused as of_inputs
    from quantkernels.w8a8 import fused as of_bytes

    joined, last = tiles(2 * HIDDEN, WIDTH, seed), tiles(WIDTH, WIDTH, seed + 1)
    down = Weight8(
        codes_OI=codes(WIDTH, HIDDEN, 128, seed),
        scale_O=random(WIDTH, seed=seed).abs() * HIDDEN**-0.5 / 64,
        kind="int8",
        features=(WIDTH, HIDDEN),
    )
    norm_I = random(WIDTH, seed=seed + 2).abs()
    angle_BLD = random(1, 1, 64, seed=seed + 3).float().repeat(1, 1, 2)
    cos_BLD, sin_BLD = (of(angle_BLD).to(torch.bfloat16) for of in (torch.cos, torch.sin))
    grid = InputGrid("affine", -128, 127)

    def step(x_TI: Tensor) -> Tensor:
        normed_TI = forward.rms_norm(x_TI, norm_I, 1e-5, "scale")
        gate_TI, up_TI = product(normed_TI, joined, SPLIT).split(HIDDEN, dim=-1)
        gated_TI = forward.silu_product(gate_TI, up_TI)
        codes_TI, scale_T1, _ = of_inputs.by_token(gated_TI, grid)
        down_TI = of_bytes.linear(codes_TI, scale_T1.flatten(), down, None, torch.bfloat16, SPLIT)
        heads_BHLD = down_TI.view(len(x_TI), 1, -1, 128).transpose(1, 2)
        turned_BHLD = forward.rotated(heads_BHLD, cos_BLD, sin_BLD)
        turned_TI = turned_BHLD.transpose(1, 2).reshape(len(x_TI), -1)
        return x_TI + product(turned_TI, last, WHOLE)

    return step


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return [block(10 * number) for number in range(BLOCKS)]


def chain(steps: list[Step], x_TI: Tensor) -> list[Tensor]:
    found = []
    for _ in range(TIMES):
        for step in steps:
            x_TI = step(x_TI / x_TI.norm() * WIDTH**0.5)
            found.append(x_TI)
    return found


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_chain_of_kernels_has_the_bits_of_one_after_another(
    tokens: int, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TI = random(tokens, WIDTH, seed=1)
    asking(monkeypatch, later=False)
    wanted = chain(steps, x_TI)
    assert all(y_TO.isfinite().all() for y_TO in wanted)
    assert not torch.equal(wanted[-1], wanted[-2])
    asking(monkeypatch, later=True)
    for y_TO, wanted_TO in zip(chain(steps, x_TI), wanted, strict=True):
        assert torch.equal(y_TO, wanted_TO)
    graph, found = captured(lambda: chain(steps, x_TI))
    for _ in range(5):
        for y_TO in found:
            y_TO.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for y_TO, wanted_TO in zip(found, wanted, strict=True):
            assert torch.equal(y_TO, wanted_TO)


@pytest.mark.parametrize(
    "launch",
    [SPLIT, WHOLE, MANY, replace(MANY, split=1)],
    ids=["split", "whole", "many, split", "many"],
)
def test_products_in_a_row_share_their_counters(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing between them: each is sent out while the one before adds up its spans."""
    weights = [tiles(2048, 2048, seed) for seed in range(4)]
    x_TI = random(3, 2048, seed=9)

    def run() -> list[Tensor]:
        found = [x_TI]
        for number in range(200):
            found.append(product(found[-1], weights[number % 4], launch))
        return found

    asking(monkeypatch, later=False)
    wanted = run()
    asking(monkeypatch, later=True)
    graph, replayed = captured(run)
    graph.replay()
    for found in (run(), replayed):
        for y_TO, wanted_TO in zip(found, wanted, strict=True):
            assert torch.equal(y_TO.isnan(), wanted_TO.isnan())
            assert torch.equal(y_TO.nan_to_num(), wanted_TO.nan_to_num())


def test_a_weight_that_the_kernel_before_writes_is_read_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a kernel that is a dependent one itself, and by torch's copy; and none is too early."""
    from quantkernels.forward import fused

    rows, columns = 4096, 4096
    weight = tiles(rows, columns, 0)
    others = [pack_codes(codes(rows, columns, 8, seed), "int4") for seed in range(1, 5)]
    bits = weight.codes_RPBW.view(torch.bfloat16).view(-1)
    gates = [random(len(bits), seed=seed) for seed in range(4)]
    x_TI = random(1, columns, seed=7)

    def written_by_ours(number: int) -> None:
        gate, up = gates[number % 4], gates[(number + 1) % 4]
        blocks = -(-len(bits) // fused.PRODUCT_BLOCK)
        fused._silu_product[(blocks,)](
            gate, up, bits, len(bits), blocks, *(0, 1), *(0, 1), fused.PRODUCT_BLOCK,
            **dependent.later_than_few(bits.device, blocks),
        )  # fmt: skip

    def run() -> list[Tensor]:
        found = []
        for number in range(TIMES):
            if number % 3 == 2:
                weight.codes_RPBW.copy_(others[number % 4])
            else:
                written_by_ours(number)
            found += [product(x_TI, weight, launch) for launch in (WHOLE, SPLIT)]
        return found

    asking(monkeypatch, later=False)
    wanted = run()
    assert len({y_TO.sum().item() for y_TO in wanted}) > 4
    asking(monkeypatch, later=True)
    eager = run()
    graph, replayed = captured(run)
    for _ in range(5):
        graph.replay()
    for found in (eager, replayed):
        for y_TO, wanted_TO in zip(found, wanted, strict=True):
            assert torch.equal(y_TO, wanted_TO)


def test_two_streams_at_once_and_one_after_the_other(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two graphs at once, without the same counters; then streams that hand each other results."""
    starts = [random(1, WIDTH, seed=seed) for seed in (1, 2)]
    asking(monkeypatch, later=False)
    wanted = [chain(steps, x_TI) for x_TI in starts]
    asking(monkeypatch, later=True)
    made = [captured(lambda x_TI=x_TI: chain(steps, x_TI)) for x_TI in starts]  # type: ignore[misc]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        for (graph, _), stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, found), alone in zip(made, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))

    def handed_over() -> list[Tensor]:
        x_TI, found, here = starts[0], [], torch.cuda.current_stream()
        for number in range(TIMES * len(steps)):
            stream = streams[number % 2]
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                x_TI = steps[number % len(steps)](x_TI / x_TI.norm() * WIDTH**0.5)
            found.append(x_TI)
            here.wait_stream(stream)
        return found

    eager = handed_over()
    graph, replayed = captured(handed_over)
    graph.replay()
    torch.cuda.synchronize()
    for found in (eager, replayed):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[0], strict=True))
