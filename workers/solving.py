"""Solve row tiles of one LinearGroup: from moments to codes.

A fallback is decided here and written down here: a Hessian that no damping makes usable means
plain rounding for its linears, and the report says so.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, dequantize, quantize, search_qparams
from quantcore.errors import SolveError
from quantcore.gptq import Factor, factorize, solve
from quantcore.moments import Moments, Span, total
from workers.plan import LayerPlan, Plan
from workers.sources import ModelSource
from workers.tasks import BandMoments, Solve, SolvedGroup, SolvedTile


def reduce_band(collected: Iterable[BandMoments], chunks: int) -> BandMoments:
    """All workers' sums for one row band, added up along the fixed tree."""
    bands = list(collected)
    moments = total(_nodes(bands, torch.device("cpu")), chunks)
    whole = (moments.sum_II.numpy(), moments.tokens, moments.dropped)
    return BandMoments(bands[0].first_row, {(0, chunks): whole})


def solve_group(
    plan: Plan,
    task: Solve,
    collected: Iterable[BandMoments],
    source: ModelSource,
    device: torch.device,
) -> SolvedGroup:
    moments = _whole(collected, plan.contract.chunks, device)
    h_II = moments.mean()
    stacks = plan.blocks[task.block].groups[task.group].stacks()
    facts: dict[str, Any] = {"tokens": moments.tokens, "dropped": moments.dropped}
    facts["silent_inputs"] = int((h_II.diagonal() == 0).sum().item())
    factor = None
    if any(stacks[number][0].method == "gptq" for number, _ in task.tiles):
        try:
            factor = factorize(h_II, plan.gptq)
            facts["damping"] = factor.damping
        except SolveError as error:
            facts["fallback"] = f"rtn: {error}"
    tiles = []
    for number in sorted({stack for stack, _ in task.tiles}):
        stack = stacks[number]
        w_OI = stacked_weights(stack, source)
        rows = plan.row_tiles(stack)
        for _, tile in (pair for pair in task.tiles if pair[0] == number):
            first, last = rows[tile]
            part_OI = w_OI[first:last].to(device)
            tiles.append(_solve_tile(plan, stack[0], (number, first), part_OI, h_II, factor))
    return SolvedGroup(task.group, tuple(tiles), facts)


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
    plan: Plan,
    layer: LayerPlan,
    place: tuple[int, int],
    w_OI: Tensor,
    h_II: Tensor,
    factor: Factor | None,
) -> SolvedTile:
    scheme = layer.scheme
    assert scheme is not None
    if layer.method == "gptq" and factor is not None:
        qparams = _range(plan, w_OI, h_II, layer)
        codes_OI = solve(w_OI, qparams, scheme, factor, plan.gptq.block_columns)
    else:
        qparams = choose_qparams(w_OI, scheme, stored=w_OI.dtype)
        codes_OI = quantize(w_OI, qparams, scheme)
    w_OI = w_OI.float()
    delta_OI = w_OI - dequantize(codes_OI, qparams, scheme)
    error_O = ((delta_OI @ h_II) * delta_OI).sum(1, dtype=torch.float64)
    output_O = ((w_OI @ h_II) * w_OI).sum(1, dtype=torch.float64)
    return SolvedTile(
        *place,
        codes_OI.cpu().numpy(),
        qparams.scale_OG.cpu().numpy(),
        qparams.zero_OG.cpu().numpy(),
        error_O.clamp(min=0).cpu().numpy(),
        output_O.clamp(min=0).cpu().numpy(),
    )


def _range(plan: Plan, w_OI: Tensor, h_II: Tensor, layer: LayerPlan) -> Qparams:
    assert layer.scheme is not None
    if plan.search_range:
        return search_qparams(w_OI, h_II.diagonal(), layer.scheme, stored=w_OI.dtype)
    return choose_qparams(w_OI, layer.scheme, stored=w_OI.dtype)
