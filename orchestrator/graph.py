"""The tasks of a job and what each waits for, from the plan and the ledger alone.

A resumed job is the same function with more blocks done: their quantization falls away and only
their forward pass is left, which replays the calibration sequences up to where the job stopped.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from jobs.spec import EvaluationSpec
from workers.layout import OUTSIDE, block_key
from workers.plan import GroupPlan, Plan
from workers.tasks import (
    Advance,
    Collect,
    CopyOutside,
    Embed,
    Evaluate,
    Publish,
    Round,
    Solve,
    Survey,
    Task,
)

Part = tuple[str, int]  # a task's id and the number of one part of its result


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One task with its place in the job."""

    id: str
    task: Task
    worker: int | None = None  # the only one that can do it, because it holds the sequences
    after: tuple[str, ...] = ()
    inputs: tuple[Part, ...] = ()
    parts: int = 0  # how many parts its result has
    cost: float = 0.0  # among tasks that anyone could do, the dearest goes first


def survey_graph(tensors: dict[str, int], workers: int) -> list[Node]:
    """Read every tensor once, spread over the workers by bytes in runs of neighbours."""
    share = sum(tensors.values()) / max(workers * 4, 1)
    runs: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in tensors.items():
        if filled > share:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += num_bytes
    return [Node(id=f"survey/{i}", task=Survey(tuple(run))) for i, run in enumerate(runs)]


def quantization_graph(plan: Plan, workers: int, done: Collection[str]) -> list[Node]:
    """Everything from the source to published blocks; `done` holds the ledger's keys."""
    nodes = []
    if OUTSIDE not in done:
        nodes.append(Node(id="outside", task=CopyOutside()))
    if plan.calibration is None:
        blocks = [b for b in range(len(plan.blocks)) if block_key(b) not in done]
        return nodes + [Node(id=f"round/{b}", task=Round(b), cost=1.0) for b in blocks]
    last = max((b for b in range(len(plan.blocks)) if block_key(b) not in done), default=-1)
    if last < 0:
        return nodes
    before = []  # what each worker's sequences wait for
    for worker, (first_chunk, last_chunk) in enumerate(chunk_ranges(plan, workers)):
        node = Node(id=f"embed/{worker}", task=Embed(first_chunk, last_chunk), worker=worker)
        nodes.append(node)
        before.append(node.id)
    for block in range(last + 1):
        after: tuple[str, ...] = ()
        if block_key(block) not in done:
            nodes += _block(plan, block, before)
            after = (f"publish/{block}",)
        if block == last:
            break
        for worker, previous in enumerate(before):
            node = Node(
                id=f"advance/{block}/{worker}",
                task=Advance(block),
                worker=worker,
                after=(previous, *after),
            )
            nodes.append(node)
            before[worker] = node.id
    return nodes


def evaluation_graph(spec: EvaluationSpec, variants: Collection[str]) -> list[Node]:
    return [Node(id=f"evaluate/{name}", task=Evaluate(name, spec), cost=1.0) for name in variants]


def chunk_ranges(plan: Plan, workers: int) -> list[tuple[int, int]]:
    """Each worker's run of whole chunks, as even as whole numbers allow."""
    chunks = plan.contract.chunks
    assert 0 < workers <= chunks
    cuts = [worker * chunks // workers for worker in range(workers + 1)]
    return list(itertools.pairwise(cuts))


def _block(plan: Plan, block: int, before: list[str]) -> list[Node]:
    """Collect on every worker, solve wherever there is room, publish once.

    A block that is skipped as a whole is only copied.
    """
    groups = plan.blocks[block].groups
    if not any(group.quantized() for group in groups):
        return [Node(id=f"publish/{block}", task=Round(block))]
    collects = [
        Node(
            id=f"collect/{block}/{worker}",
            task=Collect(block),
            worker=worker,
            after=(previous,),
            parts=len(groups),
        )
        for worker, previous in enumerate(before)
    ]
    solves = []
    for number, group in enumerate(groups):
        inputs = tuple((node.id, number) for node in collects)
        for piece, tiles in enumerate(_pieces(plan, group, len(before))):
            solves.append(
                Node(
                    id=f"solve/{block}/{number}/{piece}",
                    task=Solve(block, number, tiles),
                    inputs=inputs,
                    parts=1,
                    cost=_solve_cost(plan, group, len(tiles)),
                )
            )
    publish = Node(
        id=f"publish/{block}",
        task=Publish(block),
        after=tuple(node.id for node in collects),
        inputs=tuple((node.id, 0) for node in solves),
        cost=1.0,
    )
    return [*collects, *solves, publish]


def _pieces(plan: Plan, group: GroupPlan, workers: int) -> list[tuple[tuple[int, int], ...]]:
    """A group's row tiles in at most one hand per worker; each hand factors H for itself."""
    tiles = [
        (stack, tile)
        for stack, layers in enumerate(group.stacks())
        for tile in range(len(plan.row_tiles(layers)))
    ]
    hands = min(workers, len(tiles))
    cuts = [hand * len(tiles) // hands for hand in range(hands + 1)] if hands else []
    return [tuple(tiles[a:b]) for a, b in itertools.pairwise(cuts)]


def _solve_cost(plan: Plan, group: GroupPlan, tiles: int) -> float:
    """Multiplications: one factorization, then every row of every tile against every column."""
    width = float(group.in_features)
    return width**3 + 2 * tiles * plan.contract.row_tile * width**2
