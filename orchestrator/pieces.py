"""Into how many pieces each LinearGroup of a block is cut for its solve.

Pieces are rows, which do not know of each other; but each piece factors its group's Hessian anew
(37 ms at a width of 14,336, on one H200): no hand waits for another, and no factor is sent. So more
pieces end a group sooner and make more work of the block, and every piece is a task. Cut is what
holds up the block, as long as this gains something.
"""

import heapq
import itertools
from collections.abc import Sequence

from workers.plan import SAMPLE_TOKENS, GroupPlan, Plan

Tiles = tuple[tuple[int, int], ...]

_LEAST_GAIN = 0.02  # of the time until the last worker is through


def pieces_of(plan: Plan, groups: Sequence[GroupPlan], hands: int) -> list[list[Tiles]]:
    """For each group its row tiles in runs, to be spread over so many workers."""
    most = [min(hands if plan.summed(group) else 1, len(plan.tiles(group))) for group in groups]
    counts = [min(1, limit) for limit in most]
    costs = [_costs(plan, group, count) for group, count in zip(groups, counts, strict=True)]
    end = _end(costs, hands)
    while groups:
        widest = max(range(len(groups)), key=lambda number: max(costs[number], default=0.0))
        for count in range(counts[widest] + 1, most[widest] + 1):
            trial = [*costs[:widest], _costs(plan, groups[widest], count), *costs[widest + 1 :]]
            sooner = _end(trial, hands)
            if sooner < (1 - _LEAST_GAIN) * end:
                counts[widest], costs, end = count, trial, sooner
                break
        else:
            break
    return [_runs(plan.tiles(group), count) for group, count in zip(groups, counts, strict=True)]


def piece_cost(plan: Plan, group: GroupPlan, tiles: int) -> float:
    """Multiplications: one factorization, then every row of every tile against every column.

    Without a Hessian: each row against each sampled token, for every alpha that is tried.
    """
    width = float(group.in_features)
    if not plan.summed(group):
        return plan.alphas_tried(group) * SAMPLE_TOKENS * tiles * plan.contract.row_tile * width
    return width**3 + 2 * tiles * plan.contract.row_tile * width**2


def _costs(plan: Plan, group: GroupPlan, count: int) -> list[float]:
    return [piece_cost(plan, group, len(run)) for run in _runs(plan.tiles(group), count)]


def _runs(tiles: Tiles, count: int) -> list[Tiles]:
    cuts = [piece * len(tiles) // count for piece in range(count + 1)] if count else []
    return [tiles[first:last] for first, last in itertools.pairwise(cuts)]


def _end(costs: Sequence[Sequence[float]], hands: int) -> float:
    """When the last is through, if the dearest pieces go first, each to whoever is free."""
    busy = [0.0] * hands
    for cost in sorted((cost for of in costs for cost in of), reverse=True):
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)
