"""The graph of a job, for any number of workers and any ledger."""

from collections import Counter
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.spec import EvaluationSpec
from orchestrator.graph import (
    Node,
    chunk_ranges,
    evaluation_graph,
    quantization_graph,
    survey_graph,
)
from orchestrator.scheduler import Finished, Run, Scheduler, Started, Stop
from tests.samples import plan
from workers.layout import OUTSIDE, block_key
from workers.plan import Plan
from workers.tasks import Advance, Collect, CopyOutside, Embed, Publish, Round, Solve, Survey

Kind = TypeVar("Kind")

BLOCKS = 4
PLAN = plan(BLOCKS)
ROUNDED = plan(BLOCKS, quantization={"scheme": "int4", "method": "rtn"}, calibration=None)

worker_counts = st.integers(1, PLAN.contract.chunks)
ledgers = st.sets(st.sampled_from([OUTSIDE, *(block_key(block) for block in range(BLOCKS))]))


def of_kind(nodes: list[Node], kind: type[Kind]) -> list[tuple[Node, Kind]]:
    return [(node, node.task) for node in nodes if isinstance(node.task, kind)]


def needed(nodes: list[Node], node: Node) -> set[str]:
    """All that must be finished before a task, near or far."""
    by_id = {n.id: n for n in nodes}
    found: set[str] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        for need in {*current.after, *(source for source, _ in current.inputs)} - found:
            found.add(need)
            todo.append(by_id[need])
    return found


def every_tile(job: Plan) -> Counter[tuple[int, int, int, int]]:
    """(block, group, stack, tile) of all that is to be solved."""
    return Counter(
        (block, group, stack, tile)
        for block, plan_of_block in enumerate(job.blocks)
        for group, plan_of_group in enumerate(plan_of_block.groups)
        for stack, layers in enumerate(plan_of_group.stacks())
        for tile in range(len(job.row_tiles(layers)))
    )


def solved_tiles(nodes: list[Node]) -> Counter[tuple[int, int, int, int]]:
    return Counter(
        (task.block, task.group, stack, tile)
        for _, task in of_kind(nodes, Solve)
        for stack, tile in task.tiles
    )


def run_through(nodes: list[Node], workers: int) -> list[str]:
    """The tasks in the order in which the scheduler started them."""
    scheduler = Scheduler(nodes, workers)
    instructions = scheduler.handle(Started())
    started: list[str] = []
    waiting: list[str] = []
    while Stop(complete=True) not in instructions:
        waiting += [i.task for i in instructions if isinstance(i, Run)]
        started.append(waiting.pop(0))
        instructions = scheduler.handle(Finished(started[-1]))
    return started


@given(worker_counts)
def test_each_worker_has_a_run_of_chunks_as_even_as_can_be(workers: int) -> None:
    ranges = chunk_ranges(PLAN, workers)
    assert [chunk for first, last in ranges for chunk in range(first, last)] == list(
        range(PLAN.contract.chunks)
    )
    sizes = [last - first for first, last in ranges]
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(worker_counts)
def test_the_number_of_workers_does_not_change_what_is_solved(workers: int) -> None:
    assert solved_tiles(quantization_graph(PLAN, workers, ())) == every_tile(PLAN)


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_methods_within_a_group_are_solved_apart_and_skipped_groups_not_at_all(
    workers: int,
) -> None:
    overrides = [
        {"match": "*.k_proj", "method": "rtn"},
        {"match": "re:.*(gate|up)_proj", "skip": True},
        {"match": "*.layers.1.*", "skip": True},
    ]
    job = plan(BLOCKS, quantization={"scheme": "int4", "overrides": overrides})
    nodes = quantization_graph(job, workers, ())
    tiles = solved_tiles(nodes)
    assert tiles == every_tile(job)
    assert {stack for block, group, stack, _ in tiles if (block, group) == (0, 0)} == {0, 1, 2}
    assert {group for block, group, _, _ in tiles if block == 0} == {0, 1, 3}
    assert {block for block, _, _, _ in tiles} == {0, 2, 3}
    # block 1 is skipped as a whole: copied, with no forward pass to watch nothing
    assert [task.block for _, task in of_kind(nodes, Publish)] == [0, 2, 3]
    assert [task.block for _, task in of_kind(nodes, Round)] == [1]
    assert {task.block for _, task in of_kind(nodes, Collect)} == {0, 2, 3}
    run_through(nodes, workers)


@settings(deadline=None)
@given(worker_counts, ledgers)
def test_a_resumed_job_does_only_what_is_left(workers: int, done: set[str]) -> None:
    nodes = quantization_graph(PLAN, workers, done)
    left = [block for block in range(BLOCKS) if block_key(block) not in done]
    assert len(of_kind(nodes, CopyOutside)) == (OUTSIDE not in done)
    collected = Counter((task.block, node.worker) for node, task in of_kind(nodes, Collect))
    assert collected == Counter((block, worker) for block in left for worker in range(workers))
    assert [task.block for _, task in of_kind(nodes, Publish)] == left
    assert solved_tiles(nodes) == Counter(tile for tile in every_tile(PLAN) if tile[0] in left)
    # each worker's sequences go through every block before the last one that is left
    replayed = range(max(left, default=0))
    advanced = Counter((task.block, node.worker) for node, task in of_kind(nodes, Advance))
    assert advanced == Counter((block, worker) for block in replayed for worker in range(workers))
    assert len(of_kind(nodes, Embed)) == (workers if left else 0)
    assert sorted(run_through(nodes, workers)) == sorted(node.id for node in nodes)


@settings(deadline=None)
@given(worker_counts, ledgers)
def test_a_block_sees_what_the_published_blocks_before_it_give(
    workers: int, done: set[str]
) -> None:
    nodes = quantization_graph(PLAN, workers, done)
    for node in nodes:
        if not isinstance(node.task, Collect | Advance):
            continue
        needs = needed(nodes, node)
        block, worker = node.task.block, node.worker
        assert f"embed/{worker}" in needs
        assert {f"advance/{b}/{worker}" for b in range(block)} <= needs
        unpublished = {b for b in range(block) if block_key(b) not in done}
        assert {f"publish/{b}" for b in unpublished} <= needs
        if isinstance(node.task, Advance) and block_key(block) not in done:
            assert f"publish/{block}" in needs


@pytest.mark.parametrize("workers", [1, 3])
def test_a_solve_reads_its_group_from_every_worker(workers: int) -> None:
    nodes = quantization_graph(PLAN, workers, ())
    for node, solve in of_kind(nodes, Solve):
        collects = [f"collect/{solve.block}/{worker}" for worker in range(workers)]
        assert node.inputs == tuple((collect, solve.group) for collect in collects)
    for node, publish in of_kind(nodes, Publish):
        solves = {n.id for n, task in of_kind(nodes, Solve) if task.block == publish.block}
        assert {source for source, _ in node.inputs} == solves
        assert {f"collect/{publish.block}/{worker}" for worker in range(workers)} <= {*node.after}


def test_parts_that_are_read_are_made() -> None:
    nodes = quantization_graph(PLAN, 3, ())
    made = {node.id: node.parts for node in nodes}
    assert all(part < made[source] for node in nodes for source, part in node.inputs)


def test_only_what_holds_sequences_is_bound_to_its_worker() -> None:
    for node in quantization_graph(PLAN, 2, ()):
        assert (node.worker is not None) == isinstance(node.task, Embed | Collect | Advance)


@given(st.integers(1, 40), ledgers)
def test_plain_rounding_needs_no_sequences(workers: int, done: set[str]) -> None:
    nodes = quantization_graph(ROUNDED, workers, done)
    tasks = [node.task for node in nodes]
    expected: list[object] = [] if OUTSIDE in done else [CopyOutside()]
    expected += [Round(block) for block in range(BLOCKS) if block_key(block) not in done]
    assert tasks == expected
    assert all(node.worker is None and not node.after and not node.inputs for node in nodes)


@given(
    st.dictionaries(st.text("abc.", min_size=1), st.integers(1, 10**9), max_size=40),
    st.integers(1, 8),
)
def test_the_survey_reads_every_tensor_once(tensors: dict[str, int], workers: int) -> None:
    runs = [task.names for _, task in of_kind(survey_graph(tensors, workers), Survey)]
    assert [name for run in runs for name in run] == list(tensors)
    assert len(runs) <= 4 * workers + 1
    assert all(runs) or not tensors


def test_evaluation_measures_each_variant_by_itself() -> None:
    nodes = evaluation_graph(EvaluationSpec(tasks=("arc_easy",)), ["original", "quantized"])
    assert [node.id for node in nodes] == ["evaluate/original", "evaluate/quantized"]
    assert sorted(run_through(nodes, 2)) == ["evaluate/original", "evaluate/quantized"]
