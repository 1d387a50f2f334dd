"""Weights by shapes alone, and kernels compiled before they race: which ones, each once."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from quantkernels import arrivals

from quantcore.autoquant import ahead
from quantcore.autoquant.candidates import (
    DENSE,
    Candidate,
    candidate_of,
    candidates_of,
    offers,
    schemes_of,
    worth_timing,
)
from quantcore.autoquant.measurements import Product
from quantcore.autoquant.race import Effort
from quantcore.autoquant.shapes import num_bytes, weight_of
from quantcore.autoquant.timing import Bench, Contest, timed
from quantcore.quantize import quantize_
from quantcore.tensors import QuantizedTensor, w8a8, weight_only

H100 = ("NVIDIA H100 80GB HBM3", 132)
SHAPES = ((6144, 4096), (4096, 14336))


def legal(rows: int, columns: int, dtype: str, device: str) -> Iterator[Candidate]:
    offered = offers(candidates_of(schemes_of(["all"])), (rows, columns), dtype, device)
    return (offer.candidate for offer in worth_timing(offered))


def products(tokens: tuple[int, ...] = (1, 16, 2048)) -> list[Product]:
    return [
        Product(candidate=of, dtype="bfloat16", rows=rows, columns=columns, tokens=count)
        for rows, columns in SHAPES
        for of in legal(rows, columns, "bfloat16", "cuda")
        for count in tokens
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weight_by_shapes_alone_has_the_tensors_of_a_real_one(dtype: str) -> None:
    from quantcore.autoquant.timing import _linear

    for candidate in legal(96, 256, dtype, "cpu"):
        real = _linear(candidate, 96, 256, dtype, "cpu").weight
        made = weight_of(candidate, 96, 256, dtype)
        assert num_bytes(made) == num_bytes(real), candidate.label()
        if isinstance(real, QuantizedTensor):
            assert isinstance(made, QuantizedTensor) and made.facts == real.facts
            parts = [
                {name: (part.dtype, part.shape, part.stride()) for name, part in of.parts().items()}
                for of in (made, real)
            ]
            assert parts[0] == parts[1], candidate.label()


def test_layouts_of_a_gpu_are_packed_without_one() -> None:
    real = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False).bfloat16())
    quantize_(real, "int4", group_size=64, layout="triton_tiled", inductor_settings=False)
    made = weight_of(candidate_of("int4 sym g64 triton_tiled"), 96, 256, "bfloat16")
    assert isinstance(made, QuantizedTensor)
    told = [
        {name: (part.dtype, part.shape) for name, part in of.parts().items()}
        for of in (made, real[0].weight)  # type: ignore[union-attr]
    ]
    assert told[0] == told[1]


class Compiler:
    """Stands for a kernel of Triton's; what it is asked to compile."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def warmup(self, *args: Any, grid: Any, **constants: Any) -> None:
        args = tuple(_described(a) if hasattr(a, "block_shape") else a for a in args)
        tensors = [(a.dtype, a.dim()) for a in args if isinstance(a, torch.Tensor)]
        assert all(a.is_meta for a in args if isinstance(a, torch.Tensor))
        rest = [a for a in args if not isinstance(a, torch.Tensor)]
        self.asked.append((tuple(tensors), *rest, *constants.items()))


def _described(descriptor: Any) -> tuple[Any, ...]:
    """What a kernel is compiled for of a tensor that the accelerator of memory reads."""
    base, layout = descriptor.base, descriptor.layout
    assert base.is_meta
    return base.dtype, tuple(descriptor.block_shape), repr(layout)


Compilers = tuple[Compiler, Compiler, Compiler, Compiler]


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> Compilers:
    pytest.importorskip("triton")
    from quantkernels.w8a8 import fused as of_bytes
    from quantkernels.w8a8 import overlapped as of_many_bytes
    from quantkernels.weight_only import fused as of_weights
    from quantkernels.weight_only import overlapped as of_many

    found = Compiler(), Compiler(), Compiler(), Compiler()
    monkeypatch.setattr(of_weights, "product", found[0])
    monkeypatch.setattr(of_bytes, "_linear", found[1])
    monkeypatch.setattr(of_many, "overlapped", found[2])
    monkeypatch.setattr(of_many_bytes, "overlapped", found[3])
    return found


def test_every_launch_of_ours_is_compiled_once_by_some_process(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[list[Product]] = []
    monkeypatch.setattr(ahead, "gpu_of", lambda _: H100)
    monkeypatch.setattr(ahead, "_run", lambda given, _: shares.extend(map(list, given)))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    count = ahead.compile_ahead(products())
    assert len(shares) == 5 and sum(map(len, shares)) == count > 100
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    ahead.main(ahead._line(product, H100) for share in shares for product in share)
    assert sum(len(of.asked) for of in compilers) == count
    kernels = [ahead._kernel_of(of, H100) for share in shares for of in share]
    assert {ahead._kernel_of(of, H100) for of in products()} == {None, *kernels}
    before = [set(of.asked) for of in compilers]
    for of in compilers:
        of.asked.clear()
    for product in products():  # all of them, and not those alone that stand for others
        if ahead._kernel_of(product, H100) is not None:
            ahead.compile_one(ahead._line(product, H100))
    # numbers of rows and of turns differ; what a kernel is compiled for is the same
    assert [len({_kernel(asked) for asked in of}) for of in before] == [
        len({_kernel(asked) for asked in of.asked}) for of in compilers
    ]


def _kernel(asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of whole numbers a kernel is compiled for whether they are 1, and a multiple of 16, alone."""
    return tuple(
        (of == 1, of % 16 == 0) if type(of) is int and at < 7 else of for at, of in enumerate(asked)
    )


def test_what_is_no_kernel_of_ours_is_compiled_for_nobody() -> None:
    one = Product(candidate=DENSE, dtype="bfloat16", rows=4096, columns=4096, tokens=1)
    assert ahead._kernel_of(one, H100) is None
    for label in ("int4 sym g64 tensor_core_tiled", "int4 sym g64 plain"):
        other = Product(
            candidate=candidate_of(label), dtype="bfloat16", rows=4096, columns=4096, tokens=1
        )
        assert ahead._kernel_of(other, H100) is None
    long = Product(
        candidate=candidate_of("int4 sym g128 triton_tiled"),
        dtype="bfloat16",
        rows=28672,
        columns=4096,
        tokens=8192,
    )
    unknown = ("a GPU without data", 132)
    launch = weight_only.launch_of(
        ahead._inputs(long), weight_of(long.candidate, 28672, 4096, "bfloat16"), unknown
    )  # type: ignore[arg-type]
    assert launch.other and ahead._kernel_of(long, unknown) is None


def test_inputs_that_are_rounded_are_compiled_for_as_they_are_served(
    compilers: Compilers,
) -> None:
    x_TI = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    for label, kernels, at, kind in (
        ("int8_dynamic sym channel plain", w8a8, 1, torch.int8),
        ("float8_dynamic tensor plain", w8a8, 1, torch.float8_e4m3fn),
        ("int8_dynamic_int4 sym g32 triton_tiled", weight_only, 0, torch.bfloat16),
    ):
        weight = weight_of(candidate_of(label), 4096, 4096, "bfloat16")
        assert isinstance(weight, QuantizedTensor) and ahead._kernels_for(weight) is kernels
        kernels.compile_for(x_TI, weight, H100)
        assert compilers[at].asked[-1][0][0] == (kind, 2), label


def test_int4_weights_share_a_kernel_whether_inputs_are_rounded_or_not() -> None:
    one, other = (
        Product(
            candidate=candidate_of(f"{name} sym g64 triton_tiled"),
            dtype="bfloat16",
            rows=4096,
            columns=4096,
            tokens=16,
        )
        for name in ("int4", "int8_dynamic_int4")
    )
    assert ahead._kernel_of(one, H100) == ahead._kernel_of(other, H100) is not None


def test_a_process_that_cannot_compile_ends_in_peace() -> None:
    ahead._run([products((1,))[1:3]], H100)


@pytest.mark.gpu
def test_what_was_compiled_ahead_is_raced_in_graphs_on_a_gpu() -> None:
    candidates = [DENSE, candidate_of("int4 sym g64 triton_tiled")]
    candidates += [candidate_of("float8_dynamic channel plain")]
    contest = Contest(
        rows=4096,
        columns=4096,
        dtype="bfloat16",
        calls={1: 1.0, 16: 1.0},
        costs={of: (at,) for at, of in enumerate(candidates)},
    )
    bench = Bench("cuda")
    bench.prepare(contest.products())
    before = dict(arrivals._pools)
    found = timed(contest, {}, bench, Effort(seconds=0.2))
    assert arrivals._pools == before, "graphs captured before go on to have their counters"
    assert found.keys() == {*contest.products()}
    assert all(1 < timing.median_us < 1000 for timing in found.values())
    one = {of.candidate: found[of].median_us for of in found if of.tokens == 1}
    assert one[candidates[1]] < one[DENSE], "a fifth of the bytes"
    bench.release()
