"""Activations rounded to 8 bits on one GPU, beside torch's copy of the same tensor.

    python -m tests.benchmarks.rounding_gpu
    python -m tests.benchmarks.rounding_gpu --shapes 2048x14336 --kept 4096 8192 16384

Microseconds of `rounding.by_token` in a CUDA graph, best of three passes. The tensor stays where it
is, so that a small one is read from the cache, as what a layer has just written is. Codes and
scales are first held to the reference's, bit for bit. `--kept` tries other widths up to which a
program keeps its row in registers, and reads a wider one twice.
"""

import argparse
from functools import partial
from unittest.mock import patch

import torch
from quantkernels.rounding import InputGrid, by_token, fused, reference
from torch import Tensor

from tests.benchmarks import arguments
from tests.benchmarks.linear_timing import prepared, timed

SHAPES = [
    *((1, width) for width in (4096, 14_336)),
    *((16, width) for width in (4096, 14_336)),
    *((64, width) for width in (4096, 14_336)),
    *((2048, width) for width in (4096, 8192, 14_336, 18_944, 28_672)),
    (8192, 14_336),
]
GRIDS = {"int8": InputGrid("affine", -128, 127), "float8": InputGrid("float8", -448, 448)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=SHAPES)
    parser.add_argument("--kept", type=arguments.count, nargs="+")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, microseconds")
    kept: list[int | None] = [*(options.kept or [None])]
    names = [f"{name}{f' {width}' if width else ''}" for width in kept for name in GRIDS]
    print("".join(f"{name:>14}" for name in ("tokens", "columns", "copy", *names)))
    for shape in options.shapes:
        x_TI = torch.randn(shape, device="cuda").bfloat16()
        times_us = [_best_us(partial(torch.clone, x_TI))]
        for width in kept:
            with patch.object(fused, "KEPT", width or fused.KEPT):
                times_us += [_checked_us(x_TI, grid) for grid in GRIDS.values()]
        told = [*(f"{size:14}" for size in shape), *(f"{time_us:14.2f}" for time_us in times_us)]
        print("".join(told), flush=True)


def _checked_us(x_TI: Tensor, grid: InputGrid) -> float:
    for found, wanted in zip(by_token(x_TI, grid), reference.by_token(x_TI, grid), strict=True):
        assert torch.equal(found, wanted), f"{grid.name}, {tuple(x_TI.shape)}: not the reference's"
    return _best_us(partial(by_token, x_TI, grid))


def _best_us(call: partial[object]) -> float:
    call()
    replay = prepared([call], "cuda")
    return min(timed(replay) for _ in range(3)).p50_us


if __name__ == "__main__":
    main()
