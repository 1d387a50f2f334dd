"""How far schemes move the outputs of linears, block by block of a model that is never whole here.

Some of the calibration's sequences go through the unquantized blocks. Of each input that linears
share a sample is kept (quantcore/ranges.py), and each linear is rounded plainly under each scheme
and multiplied by it (quantcore/autoquant/sensitivity.py). Where a job names kept statistics instead
of texts, the samples are theirs and nothing is run. Errors are written block by block.

Each run of blocks begins with the texts anew, whoever has those before it: half a forward pass for
each worker, of a few sequences, and none that waits for another.

Shape suffixes: T = tokens, I = in_features.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from quantcore.autoquant.sensitivity import output_errors
from quantcore.ranges import Ranges
from quantcore.recorder import InputStatistics
from workers.blocks import BlockModel, Inputs, linears_of, run_block
from workers.plan import SAMPLE_TOKENS, GroupPlan, Plan
from workers.sensed import keep, open_errors
from workers.statistics import load_ranges
from workers.store import STORE_PATIENCE_S, open_store
from workers.tasks import Sense

SEQUENCES = 16  # of the calibration's, spread over them: enough for a sample of tokens

BlockAt = Callable[[int], nn.Module]  # a block by its number, with its weights


def sense(
    plan: Plan, model: BlockModel, block_at: BlockAt, task: Sense, tell: Callable[[int, int], None]
) -> None:
    """Measure what is wanted of the task's blocks, in their order."""
    store = open_errors(task.store, task.key, patience_s=STORE_PATIENCE_S)
    for index, block, statistics in _sampled(plan, model, block_at, task, tell):
        modules = {model.prefix(index) + name: module for name, module in linears_of(block)}
        errors = {
            name: output_errors(name, modules[name].weight, of, task.wanted[name])
            for of in statistics
            for name in of.linears
            if name in task.wanted
        }
        keep(store, errors)


def _sampled(
    plan: Plan, model: BlockModel, block_at: BlockAt, task: Sense, tell: Callable[[int, int], None]
) -> Iterator[tuple[int, nn.Module, list[InputStatistics]]]:
    """Each of the task's blocks, with what its groups of linears are handed."""
    if plan.statistics:
        for index in task.blocks:
            block = block_at(index)
            yield index, block, kept(plan, index, next(block.parameters()).device)
        return
    batches = [model.embed(ids_BL) for ids_BL in sequences(plan)]
    model.release_outside()
    last = task.blocks[-1]
    for index in range(last + 1):
        block = block_at(index)
        groups = plan.blocks[index].groups if index in task.blocks else ()
        ranges = _run(block, model.prefix(index), index, groups, batches)
        if groups:
            yield index, block, [_told(*pair) for pair in zip(groups, ranges, strict=True)]
        tell(index + 1, last + 1)


def sequences(plan: Plan) -> Iterator[Tensor]:
    """One at a time, (1, length)."""
    assert plan.tokens is not None
    count = min(SEQUENCES, len(plan.tokens))
    for number in range(count):
        row = number * len(plan.tokens) // count
        yield torch.tensor(plan.tokens[row : row + 1], dtype=torch.int64)


def _run(
    block: nn.Module, prefix: str, index: int, groups: Sequence[GroupPlan], batches: list[Inputs]
) -> list[Ranges]:
    """Take all sequences through a block; for each group, a sample of what it was handed."""
    modules = {prefix + name: module for name, module in linears_of(block)}
    device, rows = batches[0].hidden_BLH.device, -(-SAMPLE_TOKENS // len(batches))
    found = []
    real_T: Tensor | None = None

    def seen(ranges: Ranges) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].flatten(0, -2)
            x_TI = x_TI if real_T is None else x_TI[real_T]
            ranges.rows = min(rows, len(x_TI))
            ranges.add(x_TI)

        return add

    for group in groups:
        zeros_I = torch.zeros(group.in_features, device=device)
        ranges = Ranges(zeros_I, zeros_I, torch.zeros(0, len(zeros_I), device=device), rows)
        modules[group.layers[0].name].register_forward_pre_hook(seen(ranges))
        found.append(ranges)
    for inputs in batches:
        real_T = inputs.real_T
        inputs.hidden_BLH = run_block(block, inputs.calls[index], inputs.hidden_BLH)
    return found


def kept(plan: Plan, index: int, device: torch.device) -> list[InputStatistics]:
    """What a block's groups of linears were handed, as another job kept it."""
    assert plan.calibration is not None and plan.calibration.statistics is not None
    store = open_store(plan.calibration.statistics, patience_s=STORE_PATIENCE_S)
    first = sum(len(block.groups) for block in plan.blocks[:index])
    told = []
    for number, group in enumerate(plan.blocks[index].groups):
        ranges = load_ranges(store, plan.statistics[first + number], device)
        told.append(_told(group, ranges))
    return told


def _told(group: GroupPlan, ranges: Ranges) -> InputStatistics:
    names = tuple(layer.name for layer in group.layers)
    return InputStatistics(names, group.in_features, moments=None, ranges=ranges)
