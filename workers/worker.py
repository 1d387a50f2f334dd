"""A worker: one device, its slice of the calibration sequences, and the tasks it is given.

It runs alone on a laptop as well as inside an actor: nothing here knows Ray.
"""

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import LeaseError, QuantfleetError, ResourceError, SourceError
from workers.ahead import ReadAhead
from workers.blocks import BlockModel, run_block
from workers.capacity import peak_bytes
from workers.clock import Clock, TimedSource
from workers.collecting import Collector
from workers.evaluate import Tell, evaluate
from workers.fusing import Tried, fuse
from workers.held import Held, pack
from workers.kind import cores_beside, make_repeatable, matmul_flops
from workers.layout import KEPT, OUTSIDE, block_key, epoch_name, kept_in
from workers.plan import MIXED, GroupPlan, Plan
from workers.probing import probe_block
from workers.publish import (
    Encoded,
    decoded_weights,
    encode_rounded,
    encode_solved,
    publish,
    published_tensors,
)
from workers.resident import ResidentSource
from workers.solving import solve_group
from workers.sources import ModelSource, open_source
from workers.statistics import GroupStatistics, keep, load, reduce_band, whole
from workers.store import STORE_PATIENCE_S, open_store
from workers.survey import survey
from workers.tasks import (
    Account,
    Advance,
    Boundary,
    Collect,
    CopyOutside,
    Diverge,
    Drop,
    Embed,
    Evaluate,
    Hand,
    Keep,
    Load,
    Outcome,
    Probe,
    Prove,
    Publish,
    Quantize,
    Race,
    Reduce,
    Round,
    Save,
    Sense,
    Settle,
    Solve,
    SolvedGroup,
    Survey,
    Sweep,
    Take,
    Task,
)
from workers.variants import variant
from workers.writing import Writer


class Worker:
    """`tell` is called during long tasks with how many of how many steps are done."""

    def __init__(self, plan: Plan, device: str, tell: Tell = lambda done, total: None) -> None:
        make_repeatable(plan.contract.threads)
        self._plan = plan
        self.device = torch.device(device)
        self._clock = Clock(self.device)
        gguf_dtype = getattr(torch, plan.gguf_dtype)
        source = open_source(plan.model_path, gguf_dtype, patience_s=STORE_PATIENCE_S)
        if plan.model_version not in {"", source.version}:
            raise SourceError(f"{source.path} has changed since the job was checked: start again")
        self._ahead = ReadAhead(source) if source.remote else None
        self._resident: ResidentSource | None = None
        self._threads = plan.contract.threads
        if self.device.type != "cpu":
            self._resident = ResidentSource(self._ahead or source, self.device, self._clock)
            self._threads = cores_beside(self.device.type)
        reading = self._resident or self._ahead or source
        self._source: ModelSource = TimedSource(reading, self._clock)
        conditional = plan.conditional_writes
        self._store = open_store(
            plan.store, conditional_writes=conditional, patience_s=STORE_PATIENCE_S
        )
        self._model = BlockModel(self._source, plan.torch_dtype, self.device)
        self._held = Held(plan, self._model)
        self._source_blocks: dict[int, nn.Module] = {}  # that Boundary keeps loaded
        self._writer = Writer(self._clock)
        self._fused: Tried = {}
        self._encoded: tuple[tuple[SolvedGroup, ...], Encoded] | None = None  # the latest block
        self._tell = tell
        mixed = plan.contract.kind == MIXED  # else all are as fast as each other, till it shows
        self.speed = matmul_flops(self.device, plan.torch_dtype) if mixed else 1.0

    def run(self, task: Task, inputs: tuple[Any, ...] = ()) -> Outcome:
        """Do one task. `inputs` are the parts of earlier results that it was promised.

        Raises the error tree's errors. When memory runs out, on the host or the device, hidden
        states are moved out of the way and the task is done again; when that was not enough, it is
        one of those errors.
        """
        if not isinstance(task, Boundary):
            self._source_blocks.clear()
        with self._clock.task(task):
            outcome = self._tried(task, inputs)
        told = self._clock.told(wait=isinstance(task, Account))
        facts = {"peak_bytes": peak_bytes(self.device), "spent": told}
        return Outcome({**outcome.summary, **facts}, outcome.parts)

    def _tried(self, task: Task, inputs: tuple[Any, ...]) -> Outcome:
        """Its result; tried again while hidden states can be moved out of the way."""
        spilled: dict[str, Any] = {}
        while True:
            try:
                outcome = self._run(task, inputs)
                return Outcome({**outcome.summary, **spilled}, outcome.parts)
            except (MemoryError, torch.OutOfMemoryError) as error:
                why = str(error)
            # outside the handler, whose traceback holds on to the tensors of the attempt
            self._source_blocks.clear()
            self._encoded = None
            self._release()
            place = self._held.spill()
            if place is None:
                kind = type(task).__name__
                raise ResourceError(f"{self.device} ran out of memory in {kind}: {why}")
            spilled = {"spilled": place}
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()

    def close(self) -> None:
        """Let a block that is being written come to its end, whichever that is."""
        with contextlib.suppress(QuantfleetError):
            self._writer.settle()

    def _run(self, task: Task, inputs: tuple[Any, ...]) -> Outcome:  # noqa: PLR0911, PLR0912 - a table
        match task:
            case Survey(names):
                return Outcome({"hashes": survey(self._source, names, self._threads)})
            case Probe():
                return Outcome({"probe": probe_block(self._plan, self._model, task)})
            case Embed(chunks):
                self._held.embed(chunks)
                return Outcome()
            case Hand(chunks):
                return Outcome({}, self._held.hand(chunks))
            case Take(chunks):
                self._held.take(chunks, inputs)
                return Outcome()
            case Drop(chunks):
                self._held.drop(chunks)
                return Outcome()
            case Keep(block, chunks):
                self._held.keep(self._store, block, chunks)
                return Outcome()
            case Load(block, chunks):
                self._held.load(self._store, block, chunks)
                return Outcome()
            case Sweep(first, last):
                for name in self._store.list(f"{KEPT}/"):
                    if any(first <= block < last for block, _ in kept_in([name])):
                        self._store.delete(name)
                return Outcome()
            case Collect():
                return self._collect(task)
            case Reduce():
                return Outcome({}, (reduce_band(inputs, self._plan.contract.chunks),))
            case Solve():
                self._hold(task.block)
                with self._clock.spent("hessian"):
                    known = whole(inputs, self._plan.contract.chunks, self.device)
                return Outcome({}, (self._solve(task, known),))
            case Save(block, number):
                with self._clock.spent("hessian"):
                    known = whole(inputs, self._plan.contract.chunks, torch.device("cpu"))
                group = self._plan.blocks[block].groups[number]
                keep(self._store, block, number, group, known)
                return Outcome()
            case Publish():
                return self._publish(task, inputs)
            case Settle():
                return Outcome({"record": self._writer.settle()})
            case Advance():
                return self._advance(task, inputs)
            case Boundary():
                return self._boundary(task)
            case Round(block, epoch):
                self._fetch(block)
                groups = self._plan.blocks[block].groups
                encoded = self._rounded(groups)
                return self._put(epoch, block_key(block), encoded, self._model.block_tensors(block))
            case Quantize():
                return self._quantize(task)
            case CopyOutside(epoch):
                head = [GroupPlan((self._plan.head,))] if self._plan.head else []
                encoded = self._rounded(head)
                return self._put(epoch, OUTSIDE, encoded, self._model.outside_tensors())
            case Evaluate():
                return self._evaluate(task)
            case Sense() | Diverge() | Race() | Prove():
                return self._measure(task)
            case Account():
                return Outcome()

    def _block(self, index: int, replace: dict[str, Tensor] | None = None) -> nn.Module:
        with self._clock.spent("read"):
            block = self._model.block(index, replace)
        if self.device.type != "cpu" and self._plan.torch_dtype != torch.float32:
            fuse(block, self._fused)
        return block

    def _held_block(self, index: int) -> nn.Module:
        self._hold(index)
        return self._block(index)

    def _hold(self, index: int) -> None:
        """Have a block's weights on an accelerator, and the next block's on their way.

        On the CPU those of a remote model. Another shard's first block is another worker's.
        """
        holding = self._resident or self._ahead
        if holding is not None:
            last = any(index + 1 == end for _, end in self._plan.shard_ranges())
            later = () if last else self._model.block_tensors(index + 1)
            with self._clock.spent("read"):
                holding.hold(self._model.block_tensors(index), later)

    def _fetch(self, index: int) -> None:
        """Have a remote model's block read at once; its neighbours may be others' work."""
        if self._ahead is not None:
            self._ahead.hold(self._model.block_tensors(index))

    def _release(self) -> None:
        for holding in (self._resident, self._ahead):
            if holding is not None:
                holding.release()

    def _collect(self, task: Collect) -> Outcome:
        self._hold(task.block)
        block, prefix = self._block(task.block), self._model.prefix(task.block)
        collector = Collector(block, prefix, self._plan, task.block, self.device, self._clock)
        for chunk, batches in self._held.each(sorted(task.chunks), task.block):
            collector.run(chunk, batches)
        return Outcome({}, collector.parts(task.bands))

    def _publish(self, task: Publish, solved: tuple[SolvedGroup, ...]) -> Outcome:
        self._hold(task.block)
        tensors, lines = self._encode(task.block, solved)
        key, names = block_key(task.block), self._model.block_tensors(task.block)
        self._refuse_if_replaced(task.epoch)

        def write(whole_block: dict[str, Tensor]) -> dict[str, Any]:
            self._refuse_if_replaced(task.epoch)
            return publish(self._store, key, whole_block, lines)

        self._writer.begin(self._with_kept(tensors, lines, names), write)
        return Outcome()

    def _encode(self, block: int, solved: tuple[SolvedGroup, ...]) -> Encoded:
        """A block as stored, from its codes; the latest is kept for the chunks that pass it."""
        if self._encoded is not None:
            made_of, encoded = self._encoded
            if len(made_of) == len(solved) and all(map(operator.is_, made_of, solved)):
                return encoded
        groups = self._plan.blocks[block].groups
        with self._clock.spent("pack"):
            encoded = encode_solved(self._plan, groups, solved, self._source)
        self._encoded = (solved, encoded)
        return encoded

    def _rounded(self, groups: Iterable[GroupPlan]) -> Encoded:
        return encode_rounded(self._plan, groups, self._source, self.device, self._clock)

    def _solve(self, task: Solve, known: GroupStatistics) -> SolvedGroup:
        return solve_group(self._plan, task, known, self._source, self.device, self._clock)

    def _quantize(self, task: Quantize) -> Outcome:
        self._fetch(task.block)
        plan = self._plan
        assert plan.calibration is not None and plan.calibration.statistics is not None
        kept = open_store(plan.calibration.statistics, patience_s=STORE_PATIENCE_S)
        groups = plan.blocks[task.block].groups
        first = sum(len(block.groups) for block in plan.blocks[: task.block])
        solved = []
        for number, group in enumerate(groups):
            if not group.quantized():
                continue
            with self._clock.spent("read"):
                known = load(kept, plan.statistics[first + number], self.device)
            known = GroupStatistics(
                known.moments if plan.summed(group) else None,
                known.ranges if plan.ranged(group) else None,
            )
            whole_group = Solve(task.block, number, plan.tiles(group))
            solved.append(self._solve(whole_group, known))
        with self._clock.spent("pack"):
            encoded = encode_solved(plan, groups, solved, self._source)
        names = self._model.block_tensors(task.block)
        return self._put(task.epoch, block_key(task.block), encoded, names)

    def _put(self, epoch: int, key: str, encoded: Encoded, names: list[str]) -> Outcome:
        """Publish at once: the new tensors, and those of the checkpoint that stay."""
        self._refuse_if_replaced(epoch)
        tensors, lines = encoded
        whole_block = self._with_kept(tensors, lines, names)
        with self._clock.spent("write"):
            return Outcome({"record": publish(self._store, key, whole_block, lines)})

    def _with_kept(
        self, tensors: dict[str, Tensor], lines: list[dict[str, Any]], names: list[str]
    ) -> dict[str, Tensor]:
        """New tensors with, bit for bit, those of the checkpoint that stay."""
        replaced = {f"{line['layer']}.weight" for line in lines} | tensors.keys()
        kept = dict(self._source.read(name for name in names if name not in replaced))
        return {**kept, **tensors}

    def _refuse_if_replaced(self, epoch: int) -> None:
        with self._clock.spent("write"):
            replaced = self._store.exists(epoch_name(epoch + 1))
        if replaced:
            raise LeaseError(f"another driver has taken {self._store.url} over: this one stops")

    def _advance(self, task: Advance, solved: tuple[SolvedGroup, ...]) -> Outcome:
        index = task.block
        weights = {}
        if task.published:
            if solved:
                tensors, _ = self._encode(index, solved)
            else:
                with self._clock.spent("read"):
                    tensors = published_tensors(self._store, block_key(index))
            with self._clock.spent("pack"):
                weights = decoded_weights(tensors, self._plan, index, self.device)
        else:
            self._hold(index)
        block = self._block(index, weights)
        # others were taken through by an attempt that ran out of memory
        left = [chunk for chunk in task.chunks if self._held.block_of(chunk) != index + 1]
        for chunk, batches in self._held.each(left, index):
            self._held.advance(
                chunk, (run_block(block, b.calls[index], b.hidden_BLH) for b in batches)
            )
        return Outcome()

    def _boundary(self, task: Boundary) -> Outcome:
        """The blocks stay loaded from chunk to chunk, until the shard's own work begins."""
        parts = []
        for chunk in task.chunks:
            batches = list(self._held.at(chunk, task.first))
            hidden = [inputs.hidden_BLH for inputs in batches]
            for index in range(task.first, task.last):
                if index not in self._source_blocks:
                    with self._clock.spent("read", index):
                        self._hold(index)
                        self._source_blocks[index] = self._block(index)
                block = self._source_blocks[index]
                with self._clock.spent("forward", index):
                    hidden = [
                        run_block(block, inputs.calls[index], hidden_BLH)
                        for inputs, hidden_BLH in zip(batches, hidden, strict=True)
                    ]
            parts.append(pack(task.last, hidden))
        return Outcome({}, tuple(parts))

    def _measure(self, task: Sense | Diverge | Race | Prove) -> Outcome:
        """For a plan."""
        from workers.measuring import measure  # and scipy: a second, which jobs do without

        if not isinstance(task, Sense):
            self._make_room()
        return Outcome(measure(self._plan, self._model, self._held_block, task, self._tell))

    def _make_room(self) -> None:
        """For a whole model."""
        self._held.clear()
        self._release()
        self._model.release_outside()

    def _evaluate(self, task: Evaluate) -> Outcome:
        self._make_room()
        dtype = torch.float32 if self.device.type == "cpu" else self._plan.torch_dtype
        model, tokenizer = variant(task.variant, self._source, self._store, dtype, self._plan)
        model = model.to(self.device)
        metrics = evaluate(model, tokenizer, task.spec, task.text, self._tell)
        return Outcome({"metrics": metrics})
