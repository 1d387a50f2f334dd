"""X^T X in float32, the lower triangle alone, in plain torch.

The width is cut into tiles of a fixed number of columns and one product is made per row of
tiles, up to the diagonal: (n + 1) / 2n of the full product's work for n tiles. The part above
the diagonal tiles is not written.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

TILE_COLUMNS = 192


def gram(x_TI: Tensor, out_II: Tensor) -> Tensor:
    width = x_TI.shape[1]
    exact_in_bfloat16 = x_TI.dtype == torch.bfloat16
    x_TI = x_TI.float()
    with _bfloat16_products() if exact_in_bfloat16 else contextlib.nullcontext():
        for start in range(0, width, TILE_COLUMNS):
            stop = min(start + TILE_COLUMNS, width)
            torch.addmm(
                out_II[start:stop, :stop],
                x_TI[:, start:stop].t(),
                x_TI[:, :stop],
                out=out_II[start:stop, :stop],
            )
    return out_II


def gram_of_finite(x_TI: Tensor, out_II: Tensor) -> Tensor:
    if x_TI.device.type == "cpu" and _surely_finite(x_TI):
        gram(x_TI, out_II)
        return torch.zeros((), dtype=torch.int64)
    finite_T = x_TI.isfinite().all(dim=1)
    gram(torch.where(finite_T[:, None], x_TI, 0), out_II)
    return (~finite_T).sum()


def _surely_finite(x_TI: Tensor) -> bool:
    """A sum shows any value that is not finite, and costs a tenth of a look at every one.

    Large values may overflow it: then a look decides.
    """
    return bool(x_TI.sum(dim=1, dtype=torch.float32).isfinite().all())


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """CPUs that can may multiply float32 numbers as bfloat16, and add in float32 all the same.

    For numbers that came from bfloat16 that is exact, and twice as fast. Torch has this setting for
    a process: another thread's float32 products on the CPU are rounded while it holds.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
