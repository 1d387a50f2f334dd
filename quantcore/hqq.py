"""HQQ: fit each group's grid to its weights so that most errors are small, not all.

Half-quadratic quantization lowers, group by group and without a look at any input,

    sum |w - Q(w)|^p,   p < 1,   Q(w) what w is stored as

(Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"). A norm with
p < 1 forgives outliers what they cost and counts the many small errors. With auxiliary errors e,
two steps take turns while beta grows:

    e     <- shrink(r) = sign(r) max(0, |r| - |r|^(p-1) / beta),   r = w - Q(w)
    grid  <- least squares of Q(w) against w - e, the codes held

What is fitted is what the grid has, by least squares in the codes' own units. A float zero point,
as in the paper, under a scale that stays: z <- mean(w - e - q s). Without one the scale:

    s <- sum (w - e)^2 / sum (q - z)(w - e)

In the units of the weights,
s <- sum (q - z)(w - e) / sum (q - z)^2, the error would end up at right angles to Q(w), not to w:
every weight of every layer about one per cent too small, which costs a model more than the
smaller errors give it. A whole zero point stays where the extremes put it: a mean error below half
a step would be rounded away again.

Errors and beta are counted in the first scale's steps, so that beta means the same for weights of
any size. What is stored is rounded to its dtype before it is tried; every grid that the iterations
meet is measured by the very codes it would get, plain rounding's first, and each group keeps the
best: no group's objective is above plain rounding's, as float32 sums it. It may rise and fall
again, and to stop where it first rises leaves a part of the gain (a sixth, on SmolLM2 with float
zero points): each group sees every iteration through.

Groups never meet, and all is done element by element with operations that IEEE 754 rounds in one
way. So no bit hangs on which rows share a call, nor on where a row lies in memory: torch.pow would
break that on a CPU, whose vectors and remainders round it differently. |r|^p is a product of square
roots instead, for p to the nearest 1/256, and sums are folded in halves. An artifact that was made
with texts has the bytes of one made without.

Shape suffixes: O = rows of the weight, I = in_features, N = groups of a chunk, J = their weights.
Float32 maths on W's own device; nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from quantkernels.grids import ROUND
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, grid_name
from quantcore.schemes import IntegerGrid, Scheme

# weights at a time: within a core's cache, or enough to keep a GPU busy
CHUNK_OF_A_CPU, CHUNK_OF_A_DEVICE = 2**18, 2**24
_LEAST_GROUPS = 64  # of a chunk: they lie side by side in memory
_POWERS = 256  # p is a multiple of its inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class HqqConfig:
    norm: float = 0.7  # p
    beta: float | None = None  # how closely e follows the errors at first, in steps of the grid
    growth: float = 1.01  # of beta, from iteration to iteration
    iterations: int = 20

    def first_beta(self, scheme: Scheme) -> float:
        """What it was told, or what was best on SmolLM2.

        With 1 an error of less than a step is nobody's outlier: a fitted scale is freed of weights
        that it clips, and of no others. With 5 the larger errors of a shifted grid are outliers.
        """
        if self.beta is not None:
            return self.beta
        return 5.0 if scheme.zero_point == "float" else 1.0

    @property
    def power(self) -> int:
        """p in steps of 1/256."""
        return round(self.norm * _POWERS)


def hqq_qparams(w_OI: Tensor, scheme: Scheme, config: HqqConfig, *, stored: torch.dtype) -> Qparams:
    """Scale and zero point of every group, both in values that the `stored` dtype represents."""
    assert isinstance(scheme.grid, IntegerGrid) and not scheme.per_tensor
    rows, width = w_OI.shape
    plain = choose_qparams(w_OI, scheme, stored=stored)
    size = width // scheme.groups_of(width)
    groups_NJ = w_OI.reshape(-1, size)
    scale_N, zero_N = plain.scale_OG.flatten().clone(), plain.zero_OG.flatten().float()
    chunk = CHUNK_OF_A_CPU if w_OI.device.type == "cpu" else CHUNK_OF_A_DEVICE
    together = max(chunk // size, _LEAST_GROUPS)
    for first in range(0, len(groups_NJ), together):
        part = slice(first, first + together)
        w_JN = groups_NJ[part].float().t().contiguous()
        fitted = _fit(w_JN, scale_N[part], zero_N[part], scheme, config, stored)
        scale_N[part], zero_N[part] = fitted
    zero_OG = zero_N.reshape(rows, -1).to(plain.zero_OG.dtype)
    return Qparams(scale_N.reshape(rows, -1), zero_OG)


def _fit(
    w_JN: Tensor,
    scale_N: Tensor,
    zero_N: Tensor,
    scheme: Scheme,
    config: HqqConfig,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The best scale and zero point of each group, of those the iterations meet."""
    round_ = ROUND[grid_name(scheme)]
    ends = (scheme.grid.lowest, scheme.grid.highest)
    step_N, beta = scale_N, config.first_beta(scheme)
    best_scale_N, best_zero_N, least_N = scale_N, zero_N, None
    for iteration in range(config.iterations + 1):
        rounded = round_(w_JN, scale_N, zero_N, ends)
        error_JN = w_JN - rounded.values
        size_JN = error_JN.abs().div_(step_N)
        power_JN = _power(size_JN, config.power)
        objective_N = _sum(power_JN)
        if least_N is None:
            least_N = objective_N
        else:
            better_N = objective_N < least_N  # false where either is NaN
            least_N = torch.where(better_N, objective_N, least_N)
            best_scale_N = torch.where(better_N, scale_N, best_scale_N)
            best_zero_N = torch.where(better_N, zero_N, best_zero_N)
        if iteration == config.iterations:
            break
        # |r|^(p-1) is |r|^p / |r|, and 0 for an error of 0
        pull_JN = power_JN.div_(size_JN.clamp(min=1e-30)).mul_(1 / beta)
        shrunk_JN = size_JN.sub_(pull_JN).clamp_(min=0).mul_(step_N).copysign_(error_JN)
        scale_N, zero_N = _refit(
            rounded.codes.float(), w_JN - shrunk_JN, (scale_N, zero_N), scheme, stored
        )
        beta *= config.growth
    return best_scale_N, best_zero_N


def _refit(
    code_JN: Tensor,
    target_JN: Tensor,
    now: tuple[Tensor, Tensor],
    scheme: Scheme,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point by which the codes, held, come nearest to the target."""
    scale_N, zero_N = now
    if scheme.zero_point != "float":
        code_JN.sub_(zero_N)
        slope_N = _sum(target_JN.square()) / _sum(code_JN * target_JN)
        return _scale(slope_N, scale_N, stored), zero_N
    share = 1 / len(code_JN)
    mean_code_N, mean_N = _sum(code_JN) * share, _sum(target_JN) * share
    return scale_N, (mean_N - mean_code_N * scale_N).to(stored).float()


def _scale(slope_N: Tensor, scale_N: Tensor, stored: torch.dtype) -> Tensor:
    """A new scale as it is stored; where there can be none, the one before."""
    slope_N = slope_N.to(stored).float()
    return torch.where((slope_N > 0) & slope_N.isfinite(), slope_N, scale_N)


def _power(x_JN: Tensor, power: int) -> Tensor:
    """x^(power / 256), for x >= 0 and 1 <= power <= 256: a square root for each binary digit."""
    product_JN = x_JN.clone() if power == _POWERS else None
    root_JN, left = x_JN, power % _POWERS
    digit = _POWERS // 2
    while left:
        root_JN = root_JN.sqrt()
        if left >= digit:
            product_JN = root_JN.clone() if product_JN is None else product_JN.mul_(root_JN)
            left -= digit
        digit //= 2
    assert product_JN is not None
    return product_JN


def _sum(x_JN: Tensor) -> Tensor:
    """Over J, in one order everywhere: halves are added to each other until one line is left."""
    while len(x_JN) > 1:
        half = len(x_JN) // 2
        odd_N = x_JN[-1] if len(x_JN) % 2 else None
        x_JN = x_JN[:half] + x_JN[half : 2 * half]
        if odd_N is not None:
            x_JN[0] += odd_N
    return x_JN[0].clone()  # of a single line it would be a view
