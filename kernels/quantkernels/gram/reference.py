"""X^T X in float32, the lower triangle alone, in plain torch.

The width is cut into tiles of a fixed number of columns and one product is made per row of
tiles, up to the diagonal: (n + 1) / 2n of the full product's work for n tiles. The part above
the diagonal tiles is not written.
"""

import torch
from torch import Tensor

TILE_COLUMNS = 512


def gram(x_TI: Tensor, out_II: Tensor) -> Tensor:
    x_TI = x_TI.float()
    width = x_TI.shape[1]
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
    finite_T = x_TI.isfinite().all(dim=1)
    dropped = (~finite_T).sum()
    if x_TI.device.type != "cpu" or dropped.item():
        x_TI = torch.where(finite_T[:, None], x_TI, 0)
    gram(x_TI, out_II)
    return dropped
