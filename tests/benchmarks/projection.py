"""How long whole models would take on 1, 8 and 64 GPUs, from the measured cost of one block.

    python -m tests.benchmarks.projection --costs gptq_gpu.json

The costs are gptq_gpu.py's: what one more block of Llama-3.1-8B's widths takes of forward, Hessian,
factorization and solve. Turned into rates (operations a second), they price the blocks of other
shapes, and simulate.py's events, driven by the job's own scheduler, say what a fleet makes of them.
Assumed, beside that the rates hold at other widths:

    W4A16 in groups of 128; Llama shapes from 512 x 2,048 tokens, DeepSeek's from 512 x 4,096
    5 GB/s in and out of each GPU's worker, for sums, codes and hidden states
    what is read of a model, surveyed and written at 8 GB/s a host of 8 GPUs, the survey before all
    each hand of a block factors its Hessians again
    experts' products, of few tokens each, at half the rate; each is sent its tokens in balance

A mixture of experts is not handled yet: its row is what the work would take on one GPU, and shared
without loss on more.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.planning import make_plan, plan_layers
from tests.benchmarks.simulate import Costs, Simulation, splits
from tests.samples import architecture, job_spec
from workers.plan import Plan

HOST_BYTES_PER_S = 8e9
GPUS_A_HOST = 8
EXPERTS_PART = 0.5  # of the rate of large products
CHUNKS = 16


@dataclass(frozen=True)
class Linears:
    """Linears that read one input: rows in all, its width, the part of all tokens that come."""

    rows: int
    width: int
    count: int = 1
    tokens: float = 1.0

    @property
    def weights(self) -> int:
        return self.rows * self.width * self.count


@dataclass(frozen=True)
class Shape:
    name: str
    blocks: int
    hidden: int
    inner: int
    groups: tuple[Linears, ...]  # of a block, the last one read last
    outside: int  # weights
    tokens: int
    length: int
    experts: bool = False


def llama(name: str, blocks: int, hidden: int, inner: int, kv: int) -> Shape:
    groups = (
        Linears(hidden + 2 * kv, hidden),
        Linears(hidden, hidden),
        Linears(2 * inner, hidden),
        Linears(hidden, inner),
    )
    return Shape(name, blocks, hidden, inner, groups, 2 * 128256 * hidden, 512 * 2048, 2048)


def deepseek() -> Shape:
    """V3's 58 blocks with experts (its report, https://arxiv.org/abs/2412.19437, section 4.2)."""
    each = 8 / 256  # tokens that an expert is sent
    groups = (
        Linears(1536 + 576, 7168),
        Linears(24576, 1536),
        Linears(32768, 512),
        Linears(7168, 16384),
        Linears(4096, 7168),  # the shared expert
        Linears(7168, 2048),
        Linears(4096, 7168, 256, each),
        Linears(7168, 2048, 256, each),
    )
    # values of all heads, in whose width attention is counted
    return Shape(
        "DeepSeek-V3", 58, 16384, 0, groups, 2 * 129280 * 7168, 512 * 4096, 4096, experts=True
    )


SHAPES = (
    llama("Llama-3.1-8B", 32, 4096, 14336, 1024),
    llama("Llama-3.1-70B", 80, 8192, 28672, 1024),
    llama("Llama-3.1-405B", 126, 16384, 53248, 1024),
    deepseek(),
)


@dataclass(frozen=True)
class Block:
    """What a block asks for: operations, multiplications and bytes."""

    collect: float  # forward up to the last group
    advance: float
    grams: float
    factor: float  # n^3 / 3
    solve: float  # rows x width^2
    bytes: float

    @classmethod
    def of(cls, shape: Shape) -> "Block":
        def part(group: Linears) -> float:
            return EXPERTS_PART if group.count > 1 else 1.0

        passes = [2 * shape.tokens * g.tokens * g.weights / part(g) for g in shape.groups]
        attention = 2 * shape.tokens * shape.length * shape.hidden  # causal: half of 4
        grams = [shape.tokens * g.tokens * g.count * g.width**2 / part(g) for g in shape.groups]
        return cls(
            collect=sum(passes[:-1]) + attention,
            advance=sum(passes) + attention,
            grams=sum(grams),
            factor=sum(g.count * g.width**3 / 3 for g in shape.groups),
            solve=sum(g.count * g.rows * g.width**2 for g in shape.groups),
            bytes=2.0 * sum(g.weights for g in shape.groups),
        )


@dataclass(frozen=True)
class Seconds:
    collect: float
    advance: float
    factor: float
    solve: float
    rest: float  # packing, reading, waiting

    @property
    def whole(self) -> float:
        return self.collect + self.advance + self.factor + self.solve + self.rest


def priced(block: Block, measured: Block, spent: dict[str, float]) -> Seconds:
    """By the rates that the measured block comes to."""
    forward = spent["forward"] / (measured.collect + measured.advance)
    rest = sum(spent[part] for part in ("read", "pack", "write", "waiting"))
    return Seconds(
        collect=block.collect * forward + block.grams * spent["hessian"] / measured.grams,
        advance=block.advance * forward,
        factor=block.factor * spent["factor"] / measured.factor,
        solve=block.solve * spent["solve"] / measured.solve,
        rest=rest * block.bytes / measured.bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    figures = json.loads(options.costs.read_text())
    found = [n for n in figures["marginal"] if n["side"] == "ours" and n["sequences"] == 512]
    spent = found[0]["spent"]
    measured = Block.of(SHAPES[0])
    table = Table("model", "s a block", *(f"{gpus} GPUs" for gpus in options.gpus), "shards")
    for shape in SHAPES:
        block = Block.of(shape)
        each = priced(block, measured, spent)
        told, used = [], []
        for gpus in options.gpus:
            seconds, shards = _whole(shape, block, each, gpus)
            told.append(f"{seconds / 60:.1f} min")
            used.append(str(shards))
        table.add_row(shape.name, f"{each.whole:.1f}", *told, " / ".join(used))
    Console(width=100).print(table)


def _whole(shape: Shape, block: Block, each: Seconds, gpus: int) -> tuple[float, int]:
    hosts = -(-gpus // GPUS_A_HOST)
    survey = (shape.blocks * block.bytes + 2 * shape.outside) / HOST_BYTES_PER_S / hosts
    if shape.experts:
        return survey + shape.blocks * each.whole / gpus, 1
    costs = Costs(
        embed_s=0.001,
        collect_s=each.collect / CHUNKS,
        advance_s=each.advance / CHUNKS,
        solve_s=each.solve + each.rest,
        publish_s=block.bytes / 4 / HOST_BYTES_PER_S * min(gpus, GPUS_A_HOST),
        chunk_bytes=2 * shape.hidden * shape.tokens // CHUNKS,
    )
    runs = []
    for shards in splits(gpus, shape.blocks, CHUNKS):
        factors = shape.blocks / shards * each.factor
        seconds = Simulation(_plan(shape, shards), costs, gpus).run() + factors
        runs.append((survey + seconds, shards))
    return min(runs)


def _plan(shape: Shape, shards: int) -> Plan:
    length = shape.length
    spec = job_spec(
        quantization={"scheme": "int4", "group_size": 128},
        compute_dtype="bfloat16",
        calibration={
            "text": "/t",
            "sequences": shape.tokens // length,
            "length": length,
            "shards": shards,
        },
    )
    like = architecture(shape.blocks, hidden=shape.hidden, inner=shape.inner)
    layers, head, faults = plan_layers(spec, like)
    assert not faults
    return make_plan(spec, layers, head, {"device": "cuda"})


if __name__ == "__main__":
    main()
