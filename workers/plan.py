"""The plan of a job: everything that decides the artifact's bits, fixed before work starts.

It is plain data: it travels to workers, is written to the ledger, and a resumed job must arrive
at the same one.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from jobs.spec import CalibrationSpec, Method
from quantcore.gptq import GptqConfig
from quantcore.hqq import HqqConfig
from quantcore.schemes import Scheme
from quantcore.smoothing import SEARCHED_ALPHAS, NormRule

PADDING = -1  # stands in a short sequence where it has no token
RUN_WEIGHTS = 1 << 26  # that an accelerator solves together, at most
SAMPLE_TOKENS = 512  # of all the calibration tokens, to choose SmoothQuant's alpha by
BITS_VERSION = 4  # raised by hand whenever the code would give the same job other bits


# In a fleet of several kinds bits hang on who did what: such a job promises no same bytes.
MIXED = {"device": "mixed"}

Rounding = Literal["rtn", "gptq", "hqq"]  # how a layer's weights come to codes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What becomes of one linear."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme | None  # None: copied as it is
    method: Method | None


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm whose output one LinearGroup reads, and nothing else."""

    name: str  # of the module: model.layers.0.input_layernorm
    rule: NormRule
    bias: bool

    def tensors(self) -> list[str]:
        return [f"{self.name}.weight"] + ([f"{self.name}.bias"] if self.bias else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothquantConfig:
    alphas: tuple[float, ...] = SEARCHED_ALPHAS  # to choose from; a single one is taken as it is
    rounding: Rounding = "rtn"  # of the smoothed weights


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A LinearGroup: the linears of a block that read one input, and so share one Hessian."""

    layers: tuple[LayerPlan, ...]
    smoothed: Norm | None = None  # the norm that SmoothQuant's factors go into
    input_factor: bool = False  # without such a norm they stay on the linears' inputs

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    def quantized(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.scheme is not None]

    def stacks(self) -> list[list[LayerPlan]]:
        """Neighbours under one scheme and method: their rows are solved as one matrix."""
        stacks: list[list[LayerPlan]] = []
        for layer in self.quantized():
            last = stacks[-1][-1] if stacks else None
            if last and (last.scheme, last.method) == (layer.scheme, layer.method):
                stacks[-1].append(layer)
            else:
                stacks.append([layer])
        return stacks


@dataclass(frozen=True, slots=True)
class BlockPlan:
    groups: tuple[GroupPlan, ...]

    def smoothed(self) -> Iterator[Norm]:
        for group in self.groups:
            if group.smoothed is not None:
                yield group.smoothed

    def quantized(self) -> Iterator[LayerPlan]:
        for group in self.groups:
            yield from group.quantized()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What could change bits without changing the mathematics. One value each, job-wide.

    Any number of workers of one kind keeps to it, so any number gives the same bytes.
    """

    kind: dict[str, str]  # the hardware and its software, see kind.py; MIXED: whatever there is
    threads: int  # per worker: products and factorizations may round by them
    compute_dtype: str  # of the calibration forward
    micro_batch: int  # sequences per forward
    chunks: int  # leaves of the fixed tree of Hessian sums; workers own whole chunks
    row_tile: int  # rows per solve
    attention: str
    kernels: dict[str, int | str] = dataclasses.field(default_factory=dict)  # a GPU's sums
    deterministic: bool = True
    bits_version: int = BITS_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    job: str
    store: str
    model_path: str  # or URL
    gguf_dtype: str
    format: str
    blocks: tuple[BlockPlan, ...]
    head: LayerPlan | None  # the output head, where an override asks for it
    gptq: GptqConfig
    hqq: HqqConfig
    smoothquant: SmoothquantConfig
    search_range: bool
    calibration: CalibrationSpec | None
    contract: Contract
    # (sequences, length): the calibration's token ids, with PADDING after a short sequence's last
    tokens: npt.NDArray[np.int32] | None = None
    statistics: tuple[dict[str, Any], ...] = ()  # what a job kept of each LinearGroup, in order
    shards: int = 1  # runs of blocks that are calibrated at once
    conditional_writes: bool = True  # of the store
    model_version: str = ""  # as it was when the job was checked; '' where that is not known
    states_on: str = ""  # where hidden states wait from the start (shelf.py); '' for the nearest

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.contract.compute_dtype)
        return dtype

    def layers(self) -> Iterator[LayerPlan]:
        for block in self.blocks:
            for group in block.groups:
                yield from group.layers
        if self.head is not None:
            yield self.head

    def rounding(self, layer: LayerPlan) -> Rounding:
        """How a layer's weights are rounded, smoothed or not."""
        assert layer.method is not None
        return self.smoothquant.rounding if layer.method == "smoothquant" else layer.method

    def ranged(self, group: GroupPlan) -> bool:
        """Whether the ranges of a group's inputs are needed, and a sample of them."""
        schemes = (layer.scheme for layer in group.quantized())
        return self.keeps_statistics or any(s.activations for s in schemes if s)

    def summed(self, group: GroupPlan) -> bool:
        """Whether a group's Hessian is needed: to solve with, or else to tell the error by."""
        quantized = group.quantized()
        solved = any(self.rounding(layer) == "gptq" for layer in quantized)
        return self.keeps_statistics or (bool(quantized) and (solved or not self.ranged(group)))

    def alphas_tried(self, group: GroupPlan) -> int:
        """How often a group's outputs are computed to choose its smoothing by."""
        return len(self.smoothquant.alphas) if group.smoothed or group.input_factor else 1

    @property
    def padded(self) -> bool:
        return self.tokens is not None and bool((self.tokens == PADDING).any())

    @property
    def keeps_statistics(self) -> bool:
        return self.calibration is not None and self.calibration.keep_statistics

    def calibrates(self, block: int) -> bool:
        """Whether calibration sequences are run through a block for what they tell of it."""
        return any(self.summed(g) or self.ranged(g) for g in self.blocks[block].groups)

    def shard_ranges(self) -> list[tuple[int, int]]:
        """Blocks [first, last) of each shard, as even as whole numbers allow."""
        blocks = len(self.blocks)
        cuts = [shard * blocks // self.shards for shard in range(self.shards + 1)]
        return list(itertools.pairwise(cuts))

    def micro_batches(self) -> int:
        assert self.calibration is not None
        return -(-self.calibration.sequences // self.contract.micro_batch)

    def chunk_of(self, micro_batch: int) -> int:
        """Chunks are runs of micro-batches, as even as whole numbers allow."""
        return micro_batch * self.contract.chunks // self.micro_batches()

    def micro_batches_of(self, first_chunk: int, last_chunk: int) -> list[int]:
        chunks = range(first_chunk, last_chunk)
        return [m for m in range(self.micro_batches()) if self.chunk_of(m) in chunks]

    def sample_rows(self) -> int:
        """Tokens of each micro-batch that are kept as a sample of a group's inputs."""
        return max(1, SAMPLE_TOKENS // self.micro_batches())

    def tiles(self, group: GroupPlan) -> tuple[tuple[int, int], ...]:
        """Every row tile of a group, as (stack, tile)."""
        return tuple(
            (number, tile)
            for number, stack in enumerate(group.stacks())
            for tile in range(len(self.row_tiles(stack)))
        )

    def row_tiles(self, stack: list[LayerPlan]) -> list[tuple[int, int]]:
        """The rows of a stack, cut at the contract's height."""
        rows, height = sum(layer.out_features for layer in stack), self.contract.row_tile
        return [(start, min(start + height, rows)) for start in range(0, rows, height)]


def to_json(value: Any) -> Any:
    """A plan or a part of it as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
