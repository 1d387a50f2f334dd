"""A worker: one device, its slice of the calibration sequences, and the tasks it is given.

It runs alone on a laptop as well as inside an actor: nothing here knows Ray.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.spec import EvaluationSpec
from quantcore.errors import ResourceError, SourceError
from quantcore.moments import Moments, MomentTree
from workers.blocks import BlockModel, Inputs, linears_of, run_block
from workers.calibration import token_windows
from workers.evaluate import evaluate
from workers.kind import make_repeatable
from workers.layout import OUTSIDE, block_key
from workers.plan import BlockPlan, Plan
from workers.publish import encode_rounded, encode_solved, publish, published_weights
from workers.solving import solve_group
from workers.sources import open_source
from workers.store import open_store
from workers.tasks import (
    Advance,
    Collect,
    CopyOutside,
    Embed,
    Evaluate,
    GroupMoments,
    Outcome,
    Publish,
    Round,
    Solve,
    SolvedGroup,
    Survey,
    Task,
)
from workers.variants import original, rounded, stored_artifact


@dataclass(slots=True)
class _MicroBatch:
    number: int
    inputs: Inputs


class _AllSeenError(Exception):
    """The last LinearGroup has seen its input: the rest of the block's forward is not needed."""


class Worker:
    def __init__(self, plan: Plan, device: str) -> None:
        make_repeatable(plan.contract.threads)
        self._plan = plan
        self._device = torch.device(device)
        self._source = open_source(Path(plan.model_path), getattr(torch, plan.gguf_dtype))
        self._store = open_store(plan.store)
        self._model = BlockModel(self._source, plan.torch_dtype, self._device)
        self._batches: list[_MicroBatch] = []

    def run(self, task: Task, inputs: tuple[Any, ...] = ()) -> Outcome:
        """Do one task. `inputs` are the parts of earlier results that it was promised.

        Raises the error tree's errors; running out of memory, on the host or the device, is one
        of them.
        """
        try:
            return self._run(task, inputs)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"{self._device} ran out of memory in {type(task).__name__}: {error}"
            ) from None

    def _run(self, task: Task, inputs: tuple[Any, ...]) -> Outcome:  # noqa: PLR0911
        match task:
            case Survey(names):
                return Outcome({"hashes": self._survey(names)})
            case Embed(first, last):
                return self._embed(first, last)
            case Collect(block):
                return self._collect(block)
            case Solve():
                solved = solve_group(self._plan, task, inputs, self._source, self._device)
                return Outcome({}, (solved,))
            case Publish(block):
                return self._publish(block, inputs)
            case Advance(block):
                return self._advance(block)
            case Round(block):
                layers = list(self._plan.blocks[block].quantized())
                tensors, lines = encode_rounded(self._plan, layers, self._source)
                kept = self._model.block_tensors(block)
                return self._put(block_key(block), tensors, lines, kept)
            case CopyOutside():
                head = [self._plan.head] if self._plan.head else []
                tensors, lines = encode_rounded(self._plan, head, self._source)
                return self._put(OUTSIDE, tensors, lines, self._model.outside_tensors())
            case Evaluate(variant, spec):
                return self._evaluate(variant, spec)

    def _survey(self, names: tuple[str, ...]) -> dict[str, str]:
        hashes = {}
        for name, tensor in self._source.read(names):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                bad = int((~tensor.isfinite()).sum().item())
                raise SourceError(
                    f"'{name}' in {self._source.path} has {bad} values that are not finite "
                    "(NaN or infinity): fetch the model again"
                )
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(data.data).hexdigest()
        return hashes

    def _embed(self, first: int, last: int) -> Outcome:
        spec = self._plan.calibration
        assert spec is not None
        windows = token_windows(spec, self._source.tokenizer())
        size = self._plan.contract.micro_batch
        self._batches = [
            _MicroBatch(number, self._model.embed(windows[number * size : (number + 1) * size]))
            for number in self._plan.micro_batches_of(first, last)
        ]
        self._model.release_outside()
        return Outcome(
            {"tokens": sum(b.inputs.hidden_BLH.shape[:2].numel() for b in self._batches)}
        )

    def _collect(self, index: int) -> Outcome:
        plan = self._plan.blocks[index]
        block = self._model.block(index)
        trees = _watch(block, self._model.prefix(index), plan, self._plan, self._device)
        for batch in self._batches:
            trees.chunk = self._plan.chunk_of(batch.number)
            with contextlib.suppress(_AllSeenError):
                run_block(block, batch.inputs.calls[index], batch.inputs.hidden_BLH)
        return Outcome({}, trees.parts())

    def _publish(self, index: int, solved: tuple[SolvedGroup, ...]) -> Outcome:
        groups = self._plan.blocks[index].groups
        tensors, lines = encode_solved(self._plan, groups, solved, self._source)
        return self._put(block_key(index), tensors, lines, self._model.block_tensors(index))

    def _put(
        self, key: str, tensors: dict[str, Tensor], lines: list[dict[str, Any]], names: list[str]
    ) -> Outcome:
        """Publish the new tensors with, bit for bit, those of the checkpoint that stay."""
        replaced = {f"{line['layer']}.weight" for line in lines}
        kept = dict(self._source.read(name for name in names if name not in replaced))
        return Outcome({"record": publish(self._store, key, {**kept, **tensors}, lines)})

    def _advance(self, index: int) -> Outcome:
        layers = list(self._plan.blocks[index].quantized())
        weights = published_weights(self._store, block_key(index), self._plan, layers)
        block = self._model.block(index, replace=weights)
        for batch in self._batches:
            inputs = batch.inputs
            inputs.hidden_BLH = run_block(block, inputs.calls[index], inputs.hidden_BLH)
        return Outcome()

    def _evaluate(self, variant: str, spec: EvaluationSpec) -> Outcome:
        self._batches = []
        self._model.release_outside()
        dtype = self._plan.torch_dtype
        tokenizer = self._source.tokenizer()
        if variant == "original":
            model = original(self._source, dtype)
        elif variant == "rtn":
            model = rounded(self._source, dtype, self._plan)
        else:
            model, tokenizer = stored_artifact(self._store, dtype)
        return Outcome({"metrics": evaluate(model.to(self._device), tokenizer, spec)})


class _Watch:
    """Hooks on the first linear of each LinearGroup that add its input to a tree of moments."""

    def __init__(self, trees: list[MomentTree | None]) -> None:
        self.trees = trees
        self.chunk = 0

    def parts(self) -> tuple[GroupMoments, ...]:
        parts = []
        for tree in self.trees:
            nodes = {}
            if tree is not None:
                tree.close()
                nodes = {span: _portable(moments) for span, moments in tree.nodes.items()}
            parts.append(GroupMoments(nodes))
        return tuple(parts)


def _watch(
    block: nn.Module, prefix: str, plan: BlockPlan, job: Plan, device: torch.device
) -> _Watch:
    modules = {prefix + name: module for name, module in linears_of(block)}
    chunks = job.contract.chunks
    watch = _Watch(
        [
            MomentTree(chunks, group.in_features, device) if group.quantized() else None
            for group in plan.groups
        ]
    )
    watched = [index for index, tree in enumerate(watch.trees) if tree is not None]
    for index in watched:
        first = modules[plan.groups[index].layers[0].name]
        first.register_forward_pre_hook(_hook(watch, index, last=index == watched[-1]))
    return watch


def _hook(watch: _Watch, index: int, last: bool) -> Any:
    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tree = watch.trees[index]
        assert tree is not None
        tree.add(watch.chunk, args[0].flatten(0, -2))
        if last:
            raise _AllSeenError

    return add


def _portable(moments: Moments) -> tuple[Any, int, int]:
    return moments.sum_II.cpu().numpy(), moments.tokens, moments.dropped
