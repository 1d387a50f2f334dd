"""What tests of rounded inputs share: grids, shapes, inputs, and where the kernels run.

On a machine with a GPU they run on it (`pytest -m gpu`); elsewhere in Triton's interpreter, which
reads subnormal bfloat16 wrongly and stores bfloat16 truncated.
"""

import importlib.util

import pytest
import torch
from quantkernels.rounding import InputGrid
from torch import Tensor

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if ON_GPU else "cpu"
NAN, INF = float("nan"), float("inf")

GRIDS = {
    "int8": InputGrid("affine", -128, 127),
    "int8 with a zero point": InputGrid("affine", -128, 127, symmetric=False),
    "int4": InputGrid("affine", -8, 7),
    "float8": InputGrid("float8", -448, 448),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # to the bit
SHAPES = [
    (1, 1),
    (3, 8),
    (2, 3, 33),
    (5, 1000),
    *(((1, 14_336), (1500, 4096), (8192, 4096), (300, 32_768), (7, 100_000)) if ON_GPU else ()),
]

Codes = tuple[Tensor, Tensor, Tensor]

kernels = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
on_nan = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, centre: float = 0.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3 + centre).to(DEVICE, dtype)


def of_all_signs(x: Tensor) -> Tensor:
    """The same, but that of more rows than two the first has no sign, and the second one."""
    if x.shape[0] > 2:
        x[0], x[1] = 0.0, x[1].abs()
    return x


def same(found: Codes, wanted: Codes, grid: InputGrid) -> bool:
    """To the bit, but for the sign of a NaN."""
    if any(f.shape != w.shape or f.dtype != w.dtype for f, w in zip(found, wanted, strict=True)):
        return False
    codes = [given[0].view(torch.uint8).int() for given in (found, wanted)]
    if grid.name == "float8":
        codes = [torch.where(code == 0xFF, 0x7F, code) for code in codes]
    pairs = [codes, *zip(found[1:], wanted[1:], strict=True)]
    return all(torch.equal(f.nan_to_num(_NAN), w.nan_to_num(_NAN)) for f, w in pairs)


_NAN = -12345.0  # stands for one
