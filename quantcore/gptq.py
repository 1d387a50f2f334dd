"""GPTQ: pick a layer's codes so that its outputs, not its weights, move least.

With H = the mean over calibration tokens of x x^T, GPTQ lowers

    trace((W - Q) H (W - Q)^T)

by rounding one input column at a time while the columns still unrounded absorb the error
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323, section 3). Scales are fixed before the
solve, from the weights in their stored order; columns are then rounded in order of falling
activity ("static act-order"), so the artifact needs no index of groups.

Shape suffixes: O = rows of the weight, I = in_features, G = groups per row.
Float32 maths on W's own device. No files, no logging, no Ray.
"""

from dataclasses import dataclass

import torch
from quantkernels.sweep import FUSED_DEVICES, Columns, sweep, sweep_by_root
from torch import Tensor

from quantcore.affine import Qparams, grid_name
from quantcore.errors import SolveError
from quantcore.schemes import Scheme

DAMPING_STEPS = 4  # tries, each with ten times the damping of the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqConfig:
    damping: float = 0.01  # added to H's diagonal, as a fraction of that diagonal's mean
    act_order: bool = True  # round the most active inputs while most columns can still help
    block_columns: int = 128  # columns per blocked update: same method, other last bits


@dataclass(frozen=True, slots=True)
class Factor:
    """One Hessian made ready for any number of solves."""

    order_I: Tensor  # int64: the input that is rounded first, second, ...
    upper_II: Tensor  # float32; by `inverse`, U^T U = H^-1 or U U^T = H, H damped and in that order
    damping: float  # what was needed, at least what was asked for
    silent_inputs: int  # inputs that no calibration token ever made non-zero
    inverse: bool = True

    def column_costs(self) -> Tensor:
        """What (w - q)^2 in each input's column adds to the objective, float32 (I,).

        1 / U_ii^2 of the inverse's factor (Frantar et al. 2022, section 3.3): what is left of the
        error once all columns after it have made up for what they can. Not H_ii, which counts
        what they will make up for too.
        """
        root_I = self.upper_II.diagonal()
        costs_I = torch.empty_like(root_I)
        costs_I[self.order_I] = root_I.square().reciprocal() if self.inverse else root_I.square()
        return costs_I


def factorize(h_II: Tensor, config: GptqConfig) -> Factor:
    """Order, damp and factor H (float32, (I, I), symmetric).

    An input that never fired has a zero row in H: damping alone makes its pivot positive, and its
    zero cross terms keep its rounding error from moving any other column. Damping grows tenfold
    until the factorization holds; what it took is in the result, for the report. Raises
    SolveError when it never does: rounding plainly instead is the caller's decision.
    """
    diagonal_I = h_II.diagonal()
    mean = diagonal_I.double().mean().item()
    if not h_II.isfinite().all() or mean <= 0:
        raise SolveError(f"the Hessian is not usable: its mean diagonal is {mean:.3g}")
    order_I = torch.arange(len(h_II), device=h_II.device)
    if config.act_order:
        order_I = diagonal_I.argsort(descending=True, stable=True)
    damping = config.damping
    inverse = h_II.device.type not in FUSED_DEVICES
    for _ in range(DAMPING_STEPS):
        if inverse:
            upper_II = _inverse_factor(h_II[order_I][:, order_I], damping * mean)
        else:
            upper_II = _root(h_II, order_I, damping * mean)
        if upper_II is not None:
            silent = int((diagonal_I == 0).sum().item())
            return Factor(order_I, upper_II, damping, silent, inverse)
        damping *= 10
    raise SolveError(
        f"the Hessian is not positive definite even with damping {damping / 10:g} "
        f"of its mean diagonal ({mean:.3g})"
    )


def solve(
    w_OI: Tensor, qparams: Qparams, scheme: Scheme, factor: Factor, block_columns: int
) -> Tensor:
    """The codes (int8, (O, I)) that GPTQ chooses for W on the grid of `qparams`.

    Rows do not depend on each other. Which rows share a call is part of the contract of bits all
    the same: a matrix product may round differently for another number of rows.
    """
    width = w_OI.shape[1]
    group_of_I = torch.arange(width, device=w_OI.device) // (scheme.group_size or width)
    columns = Columns(
        grid=grid_name(scheme),
        scale_GO=qparams.scale_OG.t().contiguous(),
        zero_GO=qparams.zero_OG.t().contiguous().float(),
        group_of_I=group_of_I[factor.order_I],
        qmin=scheme.grid.lowest,
        qmax=scheme.grid.highest,
    )
    # turned round before it is put in order: then only whole rows of memory move
    w_IO = w_OI.t().contiguous()[factor.order_I].float()
    run = sweep if factor.inverse else sweep_by_root
    codes_IO = run(w_IO, factor.upper_II, columns, block_columns)
    return codes_IO[factor.order_I.argsort()].t().contiguous()


def _inverse_factor(h_II: Tensor, damp: float) -> Tensor | None:
    """Upper-triangular U with U^T U = inverse(H + damp * identity); None if there is none.

    With J the reversal of rows and columns and J H J = L L^T, H = (J L J)(J L J)^T, where J L J
    is upper triangular; so U = inverse(J L J): one factorization and one triangular inverse,
    and H itself is never inverted.
    """
    damped_II = h_II.clone()
    damped_II.diagonal().add_(damp)
    lower_II, failed_at = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed_at.item():
        return None
    eye_II = torch.eye(len(h_II), device=h_II.device, dtype=h_II.dtype)
    inverse_II: Tensor = torch.linalg.solve_triangular(lower_II, eye_II, upper=False)
    upper_II = inverse_II.flip(0, 1).contiguous()
    return upper_II if upper_II.isfinite().all() else None


def _root(h_II: Tensor, order_I: Tensor, damp: float) -> Tensor | None:
    """Upper-triangular V with V V^T = H + damp * identity, in that order; None if there is none.

    V is the inverse of what `_inverse_factor` gives, without the triangular inverse, which takes
    longer than the factorization. What float32 can't hold or factor, float64 may.
    """
    reversed_I = order_I.flip(0)
    for dtype in (torch.float32, torch.float64):
        damped_II = h_II[reversed_I][:, reversed_I].to(dtype)
        damped_II.diagonal().add_(damp)
        lower_II, failed_at = torch.linalg.cholesky_ex(damped_II)
        if not failed_at.item() and lower_II.isfinite().all():
            root_II: Tensor = lower_II.flip(0, 1).float()
            return root_II
    return None
