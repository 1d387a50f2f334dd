"""The launches of fused.py as operators of torch's: torch.compile and torch.export look no deeper.

They fuse nothing into them either: Inductor divides approximately, and codes are to be the same.

Their arguments are tensors and numbers: a grid is told by its fields. The values of a norm that are
not to be kept are a tensor of no rows. Triton is imported by the first call.
"""

from typing import cast

import torch
from torch import Tensor

from quantkernels.grids import GridName
from quantkernels.opaque import opaque
from quantkernels.rounding.reference import InputGrid

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def outputs(x_TI: Tensor, spans: tuple[int, ...]) -> Three:
    """Memory for codes, scales and zero points."""
    codes_TI = torch.empty(x_TI.shape, dtype=torch.int8, device=x_TI.device)
    scale = torch.empty(spans, dtype=torch.float32, device=x_TI.device)
    return codes_TI, scale, torch.empty_like(scale)


def kept(x_TI: Tensor, keep: bool) -> Tensor:
    """Memory for a norm's values."""
    shape = x_TI.shape if keep else (0, x_TI.shape[-1])
    return torch.empty(shape, dtype=x_TI.dtype, device=x_TI.device)


def _grid(name: str, qmin: int, qmax: int, symmetric: bool) -> InputGrid:
    return InputGrid(cast(GridName, name), qmin, qmax, symmetric)


def _one_for_each(x_TI: Tensor, *_grid: object) -> Three:
    return outputs(x_TI, (*x_TI.shape[:-1], 1))


def as_rounded(x_TI: Tensor, *_grid: object) -> Tensor:
    """Memory for what codes stand for."""
    return torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)


def _one_for_all(x_TI: Tensor, *_grid: object) -> Three:
    return outputs(x_TI, ())


def _normed(
    x_TI: Tensor,
    _weight_I: Tensor,
    _eps: float,
    _form: str,
    scale: Tensor | None,
    keep: bool,
    *_grid: object,
) -> Four:
    spans = (*x_TI.shape[:-1], 1) if scale is None else ()
    return *outputs(x_TI, spans), kept(x_TI, keep)


@opaque("quantkernels::round_by_token", _one_for_each)
def by_token(x_TI: Tensor, name: str, qmin: int, qmax: int, symmetric: bool) -> Three:
    from quantkernels.rounding import fused

    return fused.by_token(x_TI, _grid(name, qmin, qmax, symmetric))


@opaque("quantkernels::round_and_read_back", as_rounded)
def rounded_by_token(x_TI: Tensor, name: str, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    from quantkernels.rounding import fused

    return fused.rounded_by_token(x_TI, _grid(name, qmin, qmax, symmetric))


@opaque("quantkernels::round_by_tensor", _one_for_all)
def by_tensor(x_TI: Tensor, name: str, qmin: int, qmax: int, symmetric: bool) -> Three:
    from quantkernels.rounding import fused

    return fused.by_tensor(x_TI, _grid(name, qmin, qmax, symmetric))


@opaque("quantkernels::round_by_scale", _one_for_all)
def by_scale(
    x_TI: Tensor, scale: Tensor, name: str, qmin: int, qmax: int, symmetric: bool
) -> Three:
    from quantkernels.rounding import fused

    return fused.by_scale(x_TI, scale, _grid(name, qmin, qmax, symmetric))


@opaque("quantkernels::norm_and_round", _normed)
def norm(
    x_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    form: str,
    scale: Tensor | None,
    keep: bool,
    name: str,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> Four:
    from quantkernels.rounding import fused

    return fused.norm(x_TI, weight_I, eps, form, scale, keep, _grid(name, qmin, qmax, symmetric))
