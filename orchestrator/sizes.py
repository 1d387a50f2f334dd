"""How large the things are that a job holds, reads and writes, from shapes alone.

Where a size hangs on what happens (losses, who is faster), the larger one is told.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jobs.spec import CalibrationSpec, JobSpec
from orchestrator.block import band_count
from quantcore.formats import FORMATS
from quantcore.moments import band_rows
from quantcore.tree import fixed_tree
from workers.architecture import Architecture
from workers.plan import MIXED, SAMPLE_TOKENS, BlockPlan, GroupPlan, LayerPlan, Plan
from workers.sources import ModelSource

FLOAT32 = 4
_HEADER = 256  # bytes of a tensor's line in a file, and of its shape
_ZERO_POINTS = 1  # bytes at most


@dataclass(frozen=True)
class Sizes:
    """Of a job that `workers` share. All but counts are bytes."""

    spec: JobSpec
    plan: Plan
    architecture: Architecture
    source: ModelSource
    workers: int

    @property
    def item(self) -> int:
        return self.plan.torch_dtype.itemsize

    @property
    def evaluation_item(self) -> int:
        """CPUs evaluate in float32 whatever they calibrate in."""
        on_cpus = self.plan.contract.kind["device"] in {"cpu", MIXED["device"]}
        return FLOAT32 if on_cpus else self.item

    @property
    def shards(self) -> int:
        return min(self.plan.shards, self.workers)  # at once

    @property
    def hands(self) -> int:
        """Workers of one shard; of one block, where blocks do not wait for each other."""
        if self.plan.statistics:
            return 1
        return max(1, self.workers // self.plan.shards)

    @property
    def share(self) -> int:
        """Chunks that a worker holds, with one more than its own where others may be lost."""
        chunks = self.plan.contract.chunks
        return chunks if self.hands == 1 else min(chunks, -(-chunks // self.hands) + 1)

    @property
    def _calibration(self) -> CalibrationSpec | None:
        """None where no texts are run, since another job's statistics stand for them."""
        return None if self.plan.statistics else self.plan.calibration

    @cached_property
    def tokens(self) -> int:
        return self._calibration.sequences * self._calibration.length if self._calibration else 0

    @cached_property
    def batch_tokens(self) -> int:
        length = self._calibration.length if self._calibration else 0
        return self.plan.contract.micro_batch * length

    @cached_property
    def chunk(self) -> int:
        """The hidden states of one chunk; chunks differ by a micro-batch."""
        batches = -(-self.plan.micro_batches() // self.plan.contract.chunks)
        return batches * self.batch

    @property
    def batch(self) -> int:
        """The hidden states of one micro-batch."""
        return self.batch_tokens * self.architecture.hidden_size * self.item

    @property
    def states(self) -> int:
        return self.tokens * self.architecture.hidden_size * self.item

    @cached_property
    def model(self) -> int:
        return sum(info.num_bytes for info in self.source.tensors.values())

    @cached_property
    def model_computing(self) -> int:
        """As it is evaluated."""
        count = sum(math.prod(info.shape) for info in self.source.tensors.values())
        return count * self.evaluation_item

    @cached_property
    def largest_tensor(self) -> int:
        return max(info.num_bytes for info in self.source.tensors.values())

    @cached_property
    def outside(self) -> int:
        """What belongs to no block."""
        blocks = sum(self.block_stored(index) for index in range(len(self.plan.blocks)))
        return max(0, self.model - blocks)

    @property
    def outside_computing(self) -> int:
        return 2 * self.architecture.vocabulary * self.architecture.hidden_size * self.item

    def block_stored(self, index: int) -> int:
        """A block as the source has it."""
        return sum(self.source.tensors[name].num_bytes for name in self._names[index])

    def read_ahead(self, index: int) -> int:
        """The block after it in its shard, where a worker reads it meanwhile."""
        on_device = self.plan.contract.kind["device"] != "cpu"
        last = any(index + 1 == end for _, end in self.plan.shard_ranges())
        if last or not (self.source.remote or on_device):
            return 0
        return self.block_stored(index + 1)

    def block_computing(self, index: int) -> int:
        tensors = self.source.tensors
        return sum(math.prod(tensors[name].shape) for name in self._names[index]) * self.item

    @cached_property
    def _names(self) -> list[list[str]]:
        """The tensors of each block: those that begin as its linears do."""
        prefixes = {_prefix(block, index): index for index, block in enumerate(self.plan.blocks)}
        names: list[list[str]] = [[] for _ in self.plan.blocks]
        for name in self.source.tensors:
            parts = name.split(".")
            for length in range(1, len(parts)):
                index = prefixes.get(".".join(parts[:length]) + ".")
                if index is not None:
                    names[index].append(name)
                    break
        return names

    @cached_property
    def artifact(self) -> int:
        blocks = sum(self.block_published(index) for index in range(len(self.plan.blocks)))
        return blocks + self.outside_published

    @cached_property
    def companions(self) -> int:
        """Tokenizer, chat template and the like, which an artifact has copies of."""
        return self.source.companion_bytes() + 2**16

    def block_published(self, index: int) -> int:
        layers = [layer for group in self.plan.blocks[index].groups for layer in group.layers]
        return self.block_stored(index) - self._saved(layers) + _HEADER * len(self._names[index])

    @property
    def outside_published(self) -> int:
        return self.outside - self._saved([self.plan.head] if self.plan.head else []) + 2**16

    def _saved(self, layers: Iterable[LayerPlan]) -> int:
        """By how much quantized linears are smaller than in the source."""
        saved = 0
        for layer in layers:
            info = self.source.tensors.get(f"{layer.name}.weight")
            if layer.scheme is not None and info is not None:
                saved += info.num_bytes - quantized_bytes(
                    layer, info.dtype.itemsize, self.plan.format
                )
        return saved

    def squares(self, index: int) -> int:
        """All of a block's, each as a whole square."""
        return sum(group.in_features**2 for group in _summed(self.plan, index)) * FLOAT32

    def widest(self, index: int) -> int:
        """The widest of a block's, as a whole square."""
        widths = [group.in_features for group in _summed(self.plan, index)]
        return max(widths, default=0) ** 2 * FLOAT32

    def bands(self, index: int) -> int:
        """All of a block's as they are sent: the rows of each lower triangle in its bands."""
        return sum(self.group_bands(group) for group in _summed(self.plan, index))

    def group_bands(self, group: GroupPlan) -> int:
        count = band_count(group.in_features, self.hands)
        rows = band_rows(group.in_features, count)
        return sum((last - first) * last for first, last in rows) * FLOAT32

    def sample(self, group: GroupPlan) -> int:
        """The tokens that are kept of a group's inputs, where its ranges are wanted."""
        return FLOAT32 * SAMPLE_TOKENS * group.in_features if self.plan.ranged(group) else 0

    @property
    def statistics(self) -> int:
        """What is kept for later jobs: each group's lower triangle, ranges and sample."""
        if not self.plan.keeps_statistics:
            return 0
        groups = [group for block in self.plan.blocks for group in block.groups]
        triangles = sum(g.in_features * (g.in_features + 1) // 2 * FLOAT32 for g in groups)
        return triangles + sum(self.sample(g) + 2 * FLOAT32 * g.in_features for g in groups)

    @cached_property
    def nodes(self) -> int:
        """Of the fixed tree, those that all the workers of a shard have between them."""
        return sum(len(self._cover(run)) for run in self._runs())

    @cached_property
    def nodes_growing(self) -> int:
        """At most, of one worker while it adds up: finished ones and the one it is at."""
        runs = self._runs()
        return max(
            len(self._cover(range(run.start, stop))) + 1 for run in runs for stop in run if run
        )

    @cached_property
    def nodes_held(self) -> int:
        """Of one worker when it has added up all its chunks."""
        return max(len(self._cover(run)) for run in self._runs())

    def _runs(self) -> list[range]:
        """The chunks of each worker of a shard."""
        chunks, hands = self.plan.contract.chunks, min(self.hands, self.plan.contract.chunks)
        cuts = [-(-hand * chunks // hands) for hand in range(hands + 1)]
        return [range(first, last) for first, last in itertools.pairwise(cuts)]

    def _cover(self, run: range) -> list[tuple[int, int]]:
        """The fewest spans of the tree that make up a run of chunks."""
        chunks = self.plan.contract.chunks
        splits = fixed_tree(chunks)
        todo, cover = [(0, chunks)], []
        while todo:
            first, last = todo.pop()
            if run.start <= first and last <= run.stop:
                cover.append((first, last))
            elif first < run.stop and run.start < last and last - first > 1:
                middle = splits[first, last]
                todo += [(first, middle), (middle, last)]
        return cover


def quantized_bytes(layer: LayerPlan, scale_item: int, form: str) -> int:
    """A linear as it is published: codes in whole words, scales, zero points at most."""
    assert layer.scheme is not None
    scheme, out_features, in_features = layer.scheme, layer.out_features, layer.in_features
    words = -(-in_features * FORMATS[form].code_bits(scheme) // 32)
    groups = scheme.groups_of(in_features)
    zero = {"none": 0, "int": _ZERO_POINTS, "float": scale_item}[scheme.zero_point]
    each_row = 4 * words + groups * (scale_item + zero)
    other = FORMATS[form].other_bytes(scheme, out_features, in_features)
    return out_features * each_row + other + 3 * _HEADER


def weights_of(block: BlockPlan) -> int:
    """How many weights a block's linears have."""
    return sum(layer.out_features * layer.in_features for g in block.groups for layer in g.layers)


def _summed(plan: Plan, index: int) -> list[GroupPlan]:
    return [group for group in plan.blocks[index].groups if plan.summed(group)]


def _prefix(block: BlockPlan, index: int) -> str:
    """What the names of a block's tensors begin with: model.layers.3."""
    name = block.groups[0].layers[0].name
    before, _, _ = name.partition(f".{index}.")
    return f"{before}.{index}."
