"""Solve row tiles of one LinearGroup: from the statistics of its inputs to codes.

A fallback is decided here and written down here: a Hessian that no damping makes usable means
plain rounding for its linears, and the report says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.affine import Qparams, choose_qparams, dequantize, quantize, search_qparams
from quantcore.errors import SolveError
from quantcore.gptq import Factor, factorize, solve
from quantcore.moments import Moments
from quantcore.schemes import Scheme
from quantcore.tree import Span, total
from workers.plan import LayerPlan, Plan
from workers.smoothing import GroupInputs, smooth_group, whole_ranges
from workers.sources import ModelSource
from workers.tasks import BandMoments, InputRanges, Solve, SolvedGroup, SolvedTile


def reduce_band(collected: Iterable[BandMoments], chunks: int) -> BandMoments:
    """All workers' sums for one row band, added up along the fixed tree."""
    bands = list(collected)
    moments = total(_nodes(bands, torch.device("cpu")), chunks)
    whole = (moments.sum_II.numpy(), moments.tokens, moments.dropped)
    return BandMoments(bands[0].first_row, {(0, chunks): whole})


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a group's inputs; one of the two may not have been asked for."""

    h_II: Tensor | None  # of the smoothed inputs
    inputs: GroupInputs | None
    factor: Factor | None = None


def solve_group(
    plan: Plan,
    task: Solve,
    collected: Iterable[BandMoments | InputRanges],
    source: ModelSource,
    device: torch.device,
) -> SolvedGroup:
    known, facts = _learn(plan, task, list(collected), source, device)
    stacks = plan.blocks[task.block].groups[task.group].stacks()
    tiles = []
    for number in sorted({stack for stack, _ in task.tiles}):
        stack = stacks[number]
        w_OI = stacked_weights(stack, source)
        rows = plan.row_tiles(stack)
        for _, tile in (pair for pair in task.tiles if pair[0] == number):
            first, last = rows[tile]
            part_OI = w_OI[first:last].to(device)
            tiles.append(_solve_tile(plan, stack[0], (number, first), part_OI, known))
    inputs = known.inputs
    if inputs is None:
        return SolvedGroup(task.group, tuple(tiles), facts)
    return SolvedGroup(task.group, tuple(tiles), facts, inputs.norm, inputs.scale)


def _learn(
    plan: Plan,
    task: Solve,
    collected: list[BandMoments | InputRanges],
    source: ModelSource,
    device: torch.device,
) -> tuple[_Known, dict[str, Any]]:
    """Finish the statistics, choose the smoothing, factor the Hessian; and facts for the report."""
    group, chunks = plan.blocks[task.block].groups[task.group], plan.contract.chunks
    facts: dict[str, Any] = {}
    inputs, h_II, factor = None, None, None
    if group.ranged:
        ranges = whole_ranges((p for p in collected if isinstance(p, InputRanges)), chunks, device)
        inputs = smooth_group(plan, group, ranges, source, device)
        facts |= {"tokens": ranges.tokens, "dropped": ranges.dropped}
        facts["silent_inputs"] = int((ranges.largest() == 0).sum().item())
        facts["alpha"] = inputs.alpha
        facts["smoothed_in"] = group.smoothed.name if group.smoothed and inputs.norm else None
    if plan.summed(group):
        moments = _whole((p for p in collected if isinstance(p, BandMoments)), chunks, device)
        h_II = moments.mean()
        facts |= {"tokens": moments.tokens, "dropped": moments.dropped}
        facts["silent_inputs"] = int((h_II.diagonal() == 0).sum().item())
        if inputs is not None:
            h_II = h_II / inputs.factor_I / inputs.factor_I[:, None]
        solved = (group.stacks()[number][0] for number, _ in task.tiles)
        if any(plan.rounding(layer) == "gptq" for layer in solved):
            try:
                factor = factorize(h_II, plan.gptq)
                facts["damping"] = factor.damping
            except SolveError as error:
                facts["fallback"] = f"rtn: {error}"
    return _Known(h_II, inputs, factor), facts


def _whole(collected: Iterable[BandMoments], chunks: int, device: torch.device) -> Moments:
    """One LinearGroup's moments, from bands that are reduced or are still everyone's own."""
    by_row: dict[int, list[BandMoments]] = {}
    for part in collected:
        by_row.setdefault(part.first_row, []).append(part)
    bands = {row: total(_nodes(parts, device), chunks) for row, parts in by_row.items()}
    width = max(band.sum_II.shape[1] for band in bands.values())
    sum_II = torch.zeros(width, width, device=device)
    for row, band in bands.items():
        rows, columns = band.sum_II.shape
        sum_II[row : row + rows, :columns] = band.sum_II
    return Moments(sum_II, bands[0].tokens, bands[0].dropped)


def _nodes(parts: Iterable[BandMoments], device: torch.device) -> dict[Span, Moments]:
    return {
        span: Moments(torch.tensor(sum_RI, device=device), tokens, dropped)
        for part in parts
        for span, (sum_RI, tokens, dropped) in part.nodes.items()
    }


def stacked_weights(stack: list[LayerPlan], source: ModelSource) -> Tensor:
    weights = dict(source.read(f"{layer.name}.weight" for layer in stack))
    return torch.cat([weights[f"{layer.name}.weight"] for layer in stack])


def _solve_tile(
    plan: Plan, layer: LayerPlan, place: tuple[int, int], w_OI: Tensor, known: _Known
) -> SolvedTile:
    scheme, stored = layer.scheme, w_OI.dtype
    assert scheme is not None
    if known.inputs is not None:
        w_OI = w_OI.float() * known.inputs.factor_I
    if plan.rounding(layer) == "gptq" and known.factor is not None:
        assert known.h_II is not None
        qparams = _range(plan, w_OI, known.h_II, scheme, stored)
        codes_OI = solve(w_OI, qparams, scheme, known.factor, plan.gptq.block_columns)
    else:
        qparams = choose_qparams(w_OI, scheme, stored=stored)
        codes_OI = quantize(w_OI, qparams, scheme)
    error_O, output_O = _errors(w_OI.float(), dequantize(codes_OI, qparams, scheme), scheme, known)
    return SolvedTile(
        *place,
        codes_OI.cpu().numpy(),
        qparams.scale_OG.cpu().numpy(),
        qparams.zero_OG.cpu().numpy(),
        error_O.clamp(min=0).cpu().numpy(),
        output_O.clamp(min=0).cpu().numpy(),
    )


def _errors(
    w_OI: Tensor, rounded_OI: Tensor, scheme: Scheme, known: _Known
) -> tuple[Tensor, Tensor]:
    """Squared error of each row's output, and the squared output itself, float64.

    On the sampled tokens where there are some, with activations rounded as while serving; else
    as a mean over all tokens, from the Hessian: w H w^T.
    """
    if known.inputs is not None:
        x_SI = known.inputs.ranges.sample_SI / known.inputs.factor_I
        y_SO = x_SI @ w_OI.t()
        served_SI = fake_quantize(x_SI, scheme, known.inputs.scale if scheme.kind.static else None)
        error_SO = y_SO - served_SI @ rounded_OI.t()
        return (
            error_SO.square().sum(0, dtype=torch.float64),
            y_SO.square().sum(0, dtype=torch.float64),
        )
    h_II = known.h_II
    assert h_II is not None
    delta_OI = w_OI - rounded_OI
    error_O = ((delta_OI @ h_II) * delta_OI).sum(1, dtype=torch.float64)
    return error_O, ((w_OI @ h_II) * w_OI).sum(1, dtype=torch.float64)


def _range(plan: Plan, w_OI: Tensor, h_II: Tensor, scheme: Scheme, stored: torch.dtype) -> Qparams:
    if plan.search_range:
        return search_qparams(w_OI, h_II.diagonal(), scheme, stored=stored)
    return choose_qparams(w_OI, scheme, stored=stored)
