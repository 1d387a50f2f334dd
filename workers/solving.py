"""Solve row tiles of one LinearGroup: from the statistics of its inputs to codes.

A fallback is decided here and written down here: a Hessian that no damping makes usable means
plain rounding for its linears, and the report says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.affine import dequantize, quantize, search_qparams
from quantcore.errors import SolveError
from quantcore.formats import FORMATS
from quantcore.gptq import Factor, factorize, solve
from quantcore.schemes import Scheme
from workers.clock import Clock
from workers.plan import RUN_WEIGHTS, LayerPlan, Plan
from workers.rounding import grid_of
from workers.smoothing import GroupInputs, smooth_group
from workers.sources import ModelSource
from workers.statistics import GroupStatistics
from workers.tasks import Solve, SolvedGroup, SolvedTile


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a group's inputs; one of the two may not have been asked for."""

    h_II: Tensor | None  # of the smoothed inputs
    inputs: GroupInputs | None
    factor: Factor | None = None


def solve_group(
    plan: Plan,
    task: Solve,
    statistics: GroupStatistics,
    source: ModelSource,
    device: torch.device,
    clock: Clock,
) -> SolvedGroup:
    """Quantize some row tiles, from statistics that are on the device."""
    known, facts = _learn(plan, task, statistics, source, clock)
    stacks = plan.blocks[task.block].groups[task.group].stacks()
    tiles = []
    for number in sorted({stack for stack, _ in task.tiles}):
        stack = stacks[number]
        with clock.spent("read"):
            w_OI = stacked_weights(stack, source)
        largest = _largest(w_OI, stack[0].scheme, known)
        rows = [plan.row_tiles(stack)[tile] for stack_, tile in task.tiles if stack_ == number]
        for first, last in _runs(rows, w_OI.shape[1], device):
            part_OI = w_OI[first:last].to(device)
            tiles.append(_solve_tile(plan, stack[0], (number, first), part_OI, known, largest))
    inputs = known.inputs
    if inputs is None:
        return SolvedGroup(task.group, tuple(tiles), facts)
    stays = plan.blocks[task.block].groups[task.group].input_factor and inputs.alpha is not None
    factor_I = inputs.factor_I if stays else None
    return SolvedGroup(task.group, tuple(tiles), facts, inputs.norm, inputs.scale, factor_I)


def _runs(
    rows: list[tuple[int, int]], width: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Tiles of rows, on an accelerator joined where they meet: its kernels' bits do not hang on it.

    A product on a CPU may round by its height, so there every tile is solved by itself.
    """
    joined: list[tuple[int, int]] = []
    for first, last in rows:
        begin, end = joined[-1] if joined else (0, -1)
        if device.type != "cpu" and end == first and (last - begin) * width <= RUN_WEIGHTS:
            joined[-1] = (begin, last)
        else:
            joined.append((first, last))
    return iter(joined)


def _learn(
    plan: Plan, task: Solve, statistics: GroupStatistics, source: ModelSource, clock: Clock
) -> tuple[_Known, dict[str, Any]]:
    """Choose the smoothing and factor the Hessian; and facts for the report."""
    group = plan.blocks[task.block].groups[task.group]
    moments, ranges = statistics.moments, statistics.ranges
    facts: dict[str, Any] = {}
    inputs, h_II, factor = None, None, None
    if ranges is not None:
        inputs = smooth_group(plan, group, ranges, source)
        facts |= {"tokens": ranges.tokens, "dropped": ranges.dropped}
        facts["silent_inputs"] = int((ranges.largest() == 0).sum().item())
        facts["alpha"] = inputs.alpha
        if inputs.alpha is not None:
            facts["smoothed_in"] = group.smoothed.name if group.smoothed else "inputs"
    if moments is not None:
        h_II = moments.mean()
        facts |= {"tokens": moments.tokens, "dropped": moments.dropped}
        facts["silent_inputs"] = int((h_II.diagonal() == 0).sum().item())
        if inputs is not None:
            h_II = h_II / inputs.factor_I / inputs.factor_I[:, None]
        solved = (group.stacks()[number][0] for number, _ in task.tiles)
        if any(plan.rounding(layer) == "gptq" for layer in solved):
            try:
                with clock.spent("factor"):
                    factor = factorize(h_II, plan.gptq)
                facts["damping"] = factor.damping
            except SolveError as error:
                facts["fallback"] = f"rtn: {error}"
    return _Known(h_II, inputs, factor), facts


def stacked_weights(stack: list[LayerPlan], source: ModelSource) -> Tensor:
    weights = dict(source.read(f"{layer.name}.weight" for layer in stack))
    return torch.cat([weights[f"{layer.name}.weight"] for layer in stack])


def _largest(w_OI: Tensor, scheme: Scheme | None, known: _Known) -> Tensor | None:
    """max|w| of a whole stack, smoothed, for a scheme with one scale."""
    if scheme is None or not scheme.per_tensor:
        return None
    largest_I = w_OI.abs().amax(0).float()
    if known.inputs is not None:
        largest_I = largest_I.to(known.inputs.factor_I.device) * known.inputs.factor_I
    return largest_I.amax()


def _solve_tile(
    plan: Plan,
    layer: LayerPlan,
    place: tuple[int, int],
    w_OI: Tensor,
    known: _Known,
    largest: Tensor | None,
) -> SolvedTile:
    scheme, stored = layer.scheme, w_OI.dtype
    assert scheme is not None
    if known.inputs is not None:
        w_OI = w_OI.float() * known.inputs.factor_I
    factor = known.factor if plan.rounding(layer) == "gptq" else None
    if factor is not None and plan.search_range and scheme.searchable:
        qparams = search_qparams(w_OI, factor.column_costs(), scheme, stored=stored)
    else:
        qparams = grid_of(plan, layer, w_OI, stored=stored, largest=largest)
    qparams = FORMATS[plan.format].storable(qparams, scheme, stored)
    if factor is not None:
        codes_OI = solve(w_OI, qparams, scheme, factor, plan.gptq.block_columns)
    else:
        codes_OI = quantize(w_OI, qparams, scheme)
    error_O, output_O = _errors(w_OI.float(), dequantize(codes_OI, qparams, scheme), scheme, known)
    return SolvedTile(
        *place,
        codes_OI,
        qparams.scale_OG,
        qparams.zero_OG,
        error_O.clamp(min=0),
        output_O.clamp(min=0),
    )


def _errors(
    w_OI: Tensor, rounded_OI: Tensor, scheme: Scheme, known: _Known
) -> tuple[Tensor, Tensor]:
    """Squared error of each row's output, and the squared output itself, float64.

    On the sampled tokens, with activations rounded as while serving, if the scheme rounds them or
    nothing else was asked for; else as a mean over all tokens, from the Hessian: w H w^T.
    """
    h_II = known.h_II
    if scheme.activations is not None or h_II is None:
        assert known.inputs is not None
        x_SI = known.inputs.ranges.sample_SI / known.inputs.factor_I
        y_SO = x_SI @ w_OI.t()
        served_SI = fake_quantize(x_SI, scheme, known.inputs.scale if scheme.static else None)
        error_SO = y_SO - served_SI @ rounded_OI.t()
        return (
            error_SO.square().sum(0, dtype=torch.float64),
            y_SO.square().sum(0, dtype=torch.float64),
        )
    return _energy(w_OI - rounded_OI, h_II), _energy(w_OI, h_II)


def _energy(w_OI: Tensor, h_II: Tensor) -> Tensor:
    """w H w^T of each row, float64. On an accelerator by 16-bit products: it is only told of."""
    if w_OI.device.type == "cpu":
        product_OI = w_OI @ h_II
    else:
        product_OI = (w_OI.bfloat16() @ h_II.bfloat16()).float()
    return (product_OI * w_OI).sum(1, dtype=torch.float64)
