"""Slow float64 twins of the numerics, written from the formulas: no code of ours is used here.

Shape suffixes: O = rows of a weight, I = its inputs, T = tokens, G = groups per row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NaiveResult:
    codes_OI: Int
    # how far, in steps, the closest decision of a row was from falling the other way: where
    # this is far above float32's rounding, any correct float32 solver finds the same codes
    margin_O: Float


def correlated_inputs(tokens: int, width: int, seed: int, shared: int = 8) -> Tensor:
    """Tokens whose inputs move together, of unequal activity, float32 (T, I)."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, shared, generator=generator)
    mixing = torch.randn(shared, width, generator=generator) / shared**0.5
    noise = torch.randn(tokens, width, generator=generator)
    activity_I = 0.5 + torch.rand(width, generator=generator) * 1.5
    x_TI: Tensor = (causes @ mixing + 0.6 * noise) * activity_I
    return x_TI


def second_moment(x_TI: Tensor) -> Float:
    x = x_TI.double().numpy()
    mean: Float = x.T @ x / max(len(x), 1)
    return mean


def output_error(delta_OI: Tensor | Float, h_II: Float) -> float:
    """trace((W - Q) H (W - Q)^T)"""
    delta = np.asarray(delta_OI, dtype=np.float64)
    return float(np.einsum("oi,ij,oj->", delta, h_II, delta))


def spread(per_group_OG: Tensor, width: int) -> Float:
    """A value per group as a value per weight, float64 (O, I)."""
    values = per_group_OG.double().numpy()
    return np.repeat(values, width // values.shape[1], axis=1)


def round_plainly(w_OI: Float, scale_OI: Float, zero_OI: Float, bits: int) -> Int:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes: Int = np.clip(np.rint(w_OI / scale_OI) + zero_OI, low, high).astype(np.int64)
    return codes


def upper_factor(h_II: Float) -> Float:
    """U, upper triangular, with U^T U = H^-1."""
    factor: Float = np.linalg.cholesky(np.linalg.inv(h_II)).T
    return factor


def sweep_columns(
    w_OI: Float, upper_II: Float, scale_OI: Float, zero_OI: Float, bits: int
) -> NaiveResult:
    """One column after the other, each error handed on at once to every later column."""
    w = w_OI.copy()
    codes = np.zeros(w.shape, dtype=np.int64)
    margin = np.full(len(w), np.inf)
    for i in range(w.shape[1]):
        steps = w[:, i] / scale_OI[:, i]
        margin = np.minimum(margin, np.abs(steps - np.floor(steps) - 0.5))
        codes[:, i] = round_plainly(w[:, i], scale_OI[:, i], zero_OI[:, i], bits)
        value = (codes[:, i] - zero_OI[:, i]) * scale_OI[:, i]
        error = (w[:, i] - value) / upper_II[i, i]
        w[:, i + 1 :] -= np.outer(error, upper_II[i, i + 1 :])
    return NaiveResult(codes, margin)


def float8_values() -> tuple[Float, Int]:
    """The finite values of e4m3, rising, and their bits as int8: sign, exponent + 7, mantissa."""
    values, codes = [], []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:  # NaN; there is no infinity
            continue
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(-size if code >= 128 else size)
        codes.append(code - 256 if code >= 128 else code)
    order = np.argsort(values, kind="stable")
    return np.array(values)[order], np.array(codes)[order]


def sweep_over_values(
    w_OI: Float,
    upper_II: Float,
    grid_IN: list[tuple[Float, Int]],
    scale_OI: Float,
    zero_OI: Float,
    least_gap: float = 2.0**-9,
) -> NaiveResult:
    """The same over any grid: a column's values, rising, times its scale plus its zero.

    Margins are of the gap between the two nearest values, or of `least_gap` where that is wider.
    """
    w = w_OI.copy()
    codes = np.zeros(w.shape, dtype=np.int64)
    margin = np.full(len(w), np.inf)
    for i in range(w.shape[1]):
        values_N, codes_N = grid_IN[i]
        steps = (w[:, i] - zero_OI[:, i]) / scale_OI[:, i]
        distance_ON = np.abs(steps[:, None] - values_N)
        nearest, second = np.argsort(distance_ON, axis=1, kind="stable")[:, :2].T
        each = np.arange(len(w))
        gap = np.maximum(np.abs(values_N[second] - values_N[nearest]), least_gap)
        apart = distance_ON[each, second] - distance_ON[each, nearest]
        margin = np.minimum(margin, apart / gap / 2)
        codes[:, i] = codes_N[nearest]
        value = values_N[nearest] * scale_OI[:, i] + zero_OI[:, i]
        w[:, i + 1 :] -= np.outer((w[:, i] - value) / upper_II[i, i], upper_II[i, i + 1 :])
    return NaiveResult(codes, margin)


def naive_gptq(
    w_OI: Float, h_II: Float, scale_OI: Float, zero_OI: Float, bits: int, order_I: Int
) -> NaiveResult:
    """GPTQ over an H that is damped already, columns rounded in the order given."""
    result = sweep_columns(
        w_OI[:, order_I],
        upper_factor(h_II[np.ix_(order_I, order_I)]),
        scale_OI[:, order_I],
        zero_OI[:, order_I],
        bits,
    )
    back_I = np.argsort(order_I)
    return NaiveResult(result.codes_OI[:, back_I], result.margin_O)


def optimal_brain_quantizer(
    w_OI: Float, h_II: Float, scale_OI: Float, zero_OI: Float, bits: int, order_I: Int
) -> NaiveResult:
    """The update GPTQ derives from: invert H over the columns still unrounded, at every step."""
    w = w_OI.copy()
    codes = np.zeros(w.shape, dtype=np.int64)
    margin = np.full(len(w), np.inf)
    for step, i in enumerate(order_I):
        left = order_I[step:]
        inverse = np.linalg.inv(h_II[np.ix_(left, left)])
        steps = w[:, i] / scale_OI[:, i]
        margin = np.minimum(margin, np.abs(steps - np.floor(steps) - 0.5))
        codes[:, i] = round_plainly(w[:, i], scale_OI[:, i], zero_OI[:, i], bits)
        error = w[:, i] - (codes[:, i] - zero_OI[:, i]) * scale_OI[:, i]
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
    return NaiveResult(codes, margin)
