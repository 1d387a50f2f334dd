"""What tests of tiles share: weights of every form, inputs, and where the kernels run.

On a machine with a GPU they run on it (`pytest -m gpu`); elsewhere in Triton's interpreter, by
their plain operations and in float16, at sizes that it finishes in a moment.
"""

import importlib.util

import numpy as np
import pytest
import torch
from quantkernels.launches import Codes, Launch
from quantkernels.weight_only.tiles import Tiles, grouping, pack_codes, pack_groups
from torch import Tensor

from tests.references import float8_values

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if ON_GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]

needs_triton = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
SMALL = Launch(rows=32, tokens=16, split=1, turn=128, stages=2, warps=4)
Form = tuple[Codes, int | None, str, bool]
# codes, size of a group, grid, whether there is a zero point
FORMS: list[Form] = [
    ("int4", 32, "affine", False),
    ("int4", 64, "affine", True),
    ("int4", 128, "offset", True),
    ("int4", 256, "affine", False),
    ("int4", None, "affine", False),
    ("int4", None, "offset", True),
    ("int8", None, "affine", False),
    ("int8", 32, "affine", True),
    ("int8", 64, "offset", True),
    ("float8", None, "float8", False),
]


def codes_of(kind: Codes, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    if kind == "int4":
        return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    codes_OI = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    if kind == "float8":  # no NaN among them
        codes_OI = torch.where((codes_OI & 0x7F) == 0x7F, codes_OI ^ 1, codes_OI)
    return codes_OI


def weight_of(
    kind: Codes, size: int | None, grid: str, zero: bool, rows: int, columns: int
) -> tuple[Tiles, np.ndarray]:
    """The tiles, and the values in float64 from the formula."""
    generator = torch.Generator().manual_seed(columns)
    codes_OI = codes_of(kind, rows, columns)
    groups = -(-columns // size) if size else 1
    # scales that a 16-bit float holds, as artifacts have them
    scale_OG = (torch.rand(rows, groups, generator=generator) + 0.5).half().float() / 64
    scale_OG = scale_OG.to(torch.bfloat16).float()
    zero_OG = None
    if zero and grid == "affine":
        low, high = (-8, 8) if kind == "int4" else (-128, 128)
        zero_OG = torch.randint(low, high, (rows, groups), generator=generator).float()
    elif zero:
        zero_OG = torch.randn(rows, groups, generator=generator).to(torch.bfloat16).float() / 16
    group = grouping(size, zero=zero)
    made = Tiles(
        codes_RPBW=pack_codes(codes_OI, kind).to(DEVICE),
        scale=pack_groups(scale_OG, columns, group).to(DEVICE),
        zero=None if zero_OG is None else pack_groups(zero_OG, columns, group).to(DEVICE),
        kind=kind,
        grid=grid,  # type: ignore[arg-type]
        group=group,
        features=(rows, columns),
    )
    codes = codes_OI.numpy().astype(np.float64)
    if kind == "float8":
        values, bits = float8_values()
        table = dict(zip(bits.astype(np.int8).tolist(), values.tolist(), strict=True))
        codes = np.vectorize(table.__getitem__, otypes=[np.float64])(codes_OI.numpy().astype(int))
    spread = [
        np.repeat(t.double().numpy(), -(-columns // groups), axis=1)[:, :columns]
        for t in (scale_OG, torch.zeros_like(scale_OG) if zero_OG is None else zero_OG)
    ]
    if grid == "offset":
        return made, codes * spread[0] + spread[1]
    return made, (codes - spread[1]) * spread[0]


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=generator).to(dtype).to(DEVICE)


def relative(actual: Tensor, wanted: np.ndarray) -> float:
    difference = actual.double().cpu().numpy() - wanted
    return float(np.linalg.norm(difference) / max(np.linalg.norm(wanted), 1e-30))
