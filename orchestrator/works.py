"""The works of a job, from the plan and the ledger alone.

A resumed job is the same functions with more blocks done: their quantization falls away, and
chunks catch up through them.
"""

from collections.abc import Collection, Mapping

from orchestrator.bag import Bag
from orchestrator.calibration import Shard
from orchestrator.keeping import Keeping
from orchestrator.scheduler import Work
from orchestrator.shards import Shards
from workers.layout import OUTSIDE, block_key
from workers.plan import Plan
from workers.tasks import CopyOutside, Quantize, Round, Survey, Task


def survey_tasks(tensors: Mapping[str, int], workers: int, worth: int = 0) -> dict[str, Task]:
    """Read every tensor once, spread over the workers by bytes in runs of neighbours.

    Four runs a worker, or fewer where they would come below `worth` bytes.
    """
    share = sum(tensors.values()) / max(workers, 1)
    share = max(share / 4, min(share, worth))
    runs: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in tensors.items():
        if filled > share:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += num_bytes
    return {f"survey/{number}": Survey(tuple(run)) for number, run in enumerate(runs)}


def quantization_works(
    plan: Plan,
    done: Collection[str],
    *,
    epoch: int = 0,
    chunk_bytes: int = 1,
    losses_per_day: float = 0.0,
    kept: Collection[tuple[int, int]] = (),
) -> list[Work]:
    """Everything from the source to published blocks; `done` holds the ledger's keys.

    `chunk_bytes` is the size of one chunk's hidden states: what moving it costs. What lies outside
    the blocks is copied by whoever is idle before the blocks are finished. `losses_per_day` of a
    worker decide how often hidden states are kept; `kept` are (block, chunk) that are there.
    """
    blocks = range(len(plan.blocks))
    outside = Bag({} if OUTSIDE in done else {"outside": CopyOutside(epoch)})
    left = [block for block in blocks if block_key(block) not in done]
    if plan.calibration is None:
        return [Bag({f"round/{block}": Round(block, epoch) for block in left}), outside]
    if plan.statistics:
        tasks: dict[str, Task] = {f"quantize/{block}": Quantize(block, epoch) for block in left}
        return [Bag(tasks, heavy=True), outside]
    finished = {block for block in blocks if block_key(block) in done}
    shards: list[Shard] = []
    for first, last in plan.shard_ranges():
        before = shards[-1] if shards else None
        mine = {(block, chunk) for block, chunk in kept if first <= block < last}
        keeping = Keeping(plan.contract.chunks, chunk_bytes, losses_per_day, mine)
        options: dict[str, int] = {"epoch": epoch, "chunk_bytes": chunk_bytes}
        shards.append(
            Shard(plan, range(first, last), finished, before=before, keeping=keeping, **options)
        )
    return [Shards(shards, plan.contract.chunks), outside]
