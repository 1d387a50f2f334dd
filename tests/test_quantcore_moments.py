import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcore.moments import Moments, moment_tree
from quantcore.tree import Span, fixed_tree, total
from tests.references import correlated_inputs, second_moment

WIDTH = 24
CPU = torch.device("cpu")

chunk_counts = st.integers(1, 16)


@functools.cache
def micro_batches(chunk: int) -> list[Tensor]:
    """Some chunks hold one micro-batch, some two, of unequal sizes."""
    generator = torch.Generator().manual_seed(chunk)
    sizes = [5 + chunk % 3, 7][: 1 + chunk % 2]
    return [torch.randn(size, WIDTH, generator=generator) * 10.0 ** (chunk % 4) for size in sizes]


def collect(chunks: int, first: int, last: int) -> dict[Span, Moments]:
    """What a worker that owns chunks [first, last) has to send."""
    tree = moment_tree(chunks, WIDTH, CPU)
    for chunk in range(first, last):
        for x_TI in micro_batches(chunk):
            tree.add(chunk, x_TI)
    tree.close()
    return tree.nodes


@functools.cache
def whole(chunks: int) -> Moments:
    return total(collect(chunks, 0, chunks), chunks)


def moments_of(x_TI: Tensor) -> Moments:
    moments = Moments(torch.zeros(x_TI.shape[1], x_TI.shape[1]))
    moments.add(x_TI)
    return moments


@given(st.integers(0, 200))
def test_the_tree_covers_each_leaf_once(chunks: int) -> None:
    splits = fixed_tree(chunks)
    leaves = []
    todo = [(0, chunks)] if chunks else []
    while todo:
        first, last = todo.pop()
        if last - first == 1:
            leaves.append(first)
        else:
            middle = splits[first, last]
            assert first < middle < last
            todo += [(first, middle), (middle, last)]
    assert sorted(leaves) == list(range(chunks))
    assert len(splits) == max(chunks - 1, 0)


def test_spans_are_split_at_the_largest_power_of_two_under_their_length() -> None:
    assert fixed_tree(6) == {(0, 6): 4, (0, 4): 2, (0, 2): 1, (2, 4): 3, (4, 6): 5}


@settings(deadline=None)
@given(chunk_counts, st.data())
def test_any_split_among_workers_gives_the_same_bits(chunks: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, min(5, chunks)))
    inner = st.lists(
        st.integers(1, max(chunks - 1, 1)), min_size=workers - 1, max_size=workers - 1, unique=True
    )
    cuts = [0, *sorted(data.draw(inner)), chunks] if workers > 1 else [0, chunks]
    nodes: dict[Span, Moments] = {}
    for first, last in itertools.pairwise(cuts):
        held = collect(chunks, first, last)
        assert not held.keys() & nodes.keys()
        nodes.update(held)
    shuffled = data.draw(st.permutations(sorted(nodes)))
    merged = total({span: nodes[span] for span in shuffled}, chunks)
    alone = whole(chunks)
    assert torch.equal(merged.sum_II, alone.sum_II)
    assert (merged.tokens, merged.dropped) == (alone.tokens, alone.dropped)


@given(chunk_counts)
@settings(deadline=None)
def test_a_worker_adds_up_all_that_it_can(chunks: int) -> None:
    assert list(collect(chunks, 0, chunks)) == [(0, chunks)]


def test_the_order_of_additions_is_worth_fixing() -> None:
    """Else the test of equal bits would hold for any order at all."""
    leaves = [moments_of(torch.cat(micro_batches(chunk))).sum_II for chunk in range(16)]
    in_a_row_II = torch.zeros(WIDTH, WIDTH)
    for leaf_II in leaves:
        in_a_row_II += leaf_II
    assert not torch.equal(in_a_row_II, whole(16).sum_II)
    relative = (in_a_row_II - whole(16).sum_II).abs().max() / whole(16).sum_II.max()
    assert relative < 1e-6


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 16])
def test_the_total_is_that_of_all_tokens(chunks: int) -> None:
    x_TI = torch.cat([x for chunk in range(chunks) for x in micro_batches(chunk)])
    found = whole(chunks)
    assert (found.tokens, found.dropped) == (len(x_TI), 0)
    expected_II = second_moment(x_TI)
    assert np.abs(found.mean().numpy() - expected_II).max() < 1e-5 * np.abs(expected_II).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 96, 515])
def test_the_mean_is_symmetric_and_that_of_float64(width: int, dtype: torch.dtype) -> None:
    x_TI = correlated_inputs(300, width, seed=1).to(dtype)
    mean_II = moments_of(x_TI).mean()
    assert torch.equal(mean_II, mean_II.t())
    expected_II = second_moment(x_TI)
    # entries of unlike inputs cancel: relative to the sizes that met there
    size_I = np.sqrt(np.diag(expected_II))
    assert (np.abs(mean_II.numpy() - expected_II) <= 1e-5 * np.outer(size_I, size_I)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_are_left_out_and_counted(
    poison: float, dtype: torch.dtype
) -> None:
    x_TI = correlated_inputs(40, WIDTH, seed=2).to(dtype)
    kept_TI = x_TI[[t for t in range(40) if t not in (0, 7, 39)]]
    x_TI[0, 3] = poison
    x_TI[7] = poison
    x_TI[39, WIDTH - 1] = poison
    before_TI = x_TI.clone()
    moments = moments_of(x_TI)
    assert (moments.tokens, moments.dropped) == (37, 3)
    mean_II = moments.mean().double().numpy()
    expected_II = second_moment(kept_TI)
    assert np.abs(mean_II - expected_II).max() < 1e-5 * np.abs(expected_II).max()
    assert torch.equal(x_TI.nan_to_num(7.0), before_TI.nan_to_num(7.0))


def test_counts_of_dropped_tokens_are_merged() -> None:
    bad_TI = torch.full((3, WIDTH), float("nan"))
    tree = moment_tree(2, WIDTH, CPU)
    tree.add(0, bad_TI)
    tree.add(0, torch.ones(2, WIDTH))
    tree.add(1, bad_TI)
    tree.close()
    found = total(tree.nodes, 2)
    assert (found.tokens, found.dropped) == (2, 6)
    assert torch.equal(found.mean(), torch.ones(WIDTH, WIDTH))


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_usable_token_at_all_gives_zeros(tokens: int) -> None:
    mean_II = moments_of(torch.full((tokens, WIDTH), float("inf"))).mean()
    assert torch.equal(mean_II, torch.zeros(WIDTH, WIDTH))


def test_only_the_lower_triangle_counts() -> None:
    clean, poisoned = (moments_of(torch.ones(3, 600)) for _ in range(2))
    poisoned.sum_II[torch.ones(600, 600, dtype=torch.bool).triu(1)] = float("nan")
    assert torch.equal(poisoned.merged(poisoned).mean(), clean.merged(clean).mean())
    assert clean.mean().isfinite().all()
