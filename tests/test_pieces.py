"""How solves are cut: every row once, no more pieces than help, and nobody left behind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.pieces import piece_cost, pieces_of
from tests.benchmarks.simulate import make_plan
from workers.plan import GroupPlan, Plan

LLAMA_8B: Plan = make_plan(1, 512, 2048, 1)


@settings(max_examples=30, deadline=None)
@given(hands=st.integers(1, 64))
def test_every_tile_is_in_one_piece(hands: int) -> None:
    groups = LLAMA_8B.blocks[0].groups
    for group, pieces in zip(groups, pieces_of(LLAMA_8B, groups, hands), strict=True):
        assert tuple(tile for piece in pieces for tile in piece) == LLAMA_8B.tiles(group)
        assert all(pieces) and 1 <= len(pieces) <= hands


def _last_through(groups: tuple[GroupPlan, ...], hands: int, counts: list[int]) -> float:
    """Written anew: pieces as equal as tiles allow, the dearest first to the least busy."""
    costs = []
    for group, count in zip(groups, counts, strict=True):
        tiles = len(LLAMA_8B.tiles(group))
        sizes = [(n + 1) * tiles // count - n * tiles // count for n in range(count)]
        costs += [piece_cost(LLAMA_8B, group, size) for size in sizes]
    busy = [0.0] * hands
    for cost in sorted(costs, reverse=True):
        busy[busy.index(min(busy))] += cost
    return max(busy)


@pytest.mark.parametrize("hands", [1, 2, 3, 4, 6, 8])
def test_no_worker_ends_later_than_if_all_were_cut_for_all(hands: int) -> None:
    groups = LLAMA_8B.blocks[0].groups
    counts = [len(pieces) for pieces in pieces_of(LLAMA_8B, groups, hands)]
    everywhere = [min(hands, len(LLAMA_8B.tiles(group))) for group in groups]
    assert _last_through(groups, hands, counts) <= 1.02 * _last_through(groups, hands, everywhere)
    assert sum(counts) <= sum(everywhere)


def test_one_worker_is_given_whole_groups() -> None:
    groups = LLAMA_8B.blocks[0].groups
    assert [len(pieces) for pieces in pieces_of(LLAMA_8B, groups, 1)] == [1] * len(groups)


def test_the_wide_group_is_cut_and_small_ones_stay_whole() -> None:
    groups = LLAMA_8B.blocks[0].groups
    counts = {
        group.in_features: len(pieces)
        for group, pieces in zip(groups, pieces_of(LLAMA_8B, groups, 4), strict=True)
        if group.in_features != 4096 or group.layers[0].out_features < 14336
    }
    assert counts[14336] > 1
    assert counts[4096] == 1
