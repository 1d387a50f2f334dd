"""A fleet of up to a thousand GPUs in discrete events, driven by the very scheduler of a job.

    python -m tests.benchmarks.simulate --costs costs.json --blocks 32 --gpus 8 64 256 1024
    python -m tests.benchmarks.simulate --costs costs.json --check 2 --measured-s 123

Nothing of the scheduler is copied here: instructions come from orchestrator.scheduler.Scheduler
over orchestrator.works, and only what a task costs is made up, from figures that block_costs.py
measured on one worker:

    compute of a task  its chunks (or its share of a block's solves) times the measured seconds
    transfer           bytes of the inputs that other nodes made, over this node's share of network
    failure            each worker is lost at a given rate, all its results with it; another one
                       comes after a delay

Said for each size: hours for the model, the efficiency against one GPU, gigabytes over the network,
and what one lost worker an hour costs.
"""

import argparse
import heapq
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.scheduler import (
    Assignment,
    Finished,
    InputsMissing,
    Joined,
    Release,
    Run,
    Scheduler,
    Stop,
    WorkerLost,
)
from orchestrator.works import quantization_works
from tests.samples import architecture, job_spec
from workers.plan import Plan
from workers.tasks import (
    Advance,
    Boundary,
    Collect,
    CopyOutside,
    Embed,
    Hand,
    Publish,
    Reduce,
    Settle,
    Solve,
    Take,
)

CALL_S = 0.005  # between an instruction and its task, and between a result and the next event
FLOAT32 = 4
CODES_BYTES = 1  # of a weight, on its way from a solve to its block's file


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds on one worker: of one chunk, or of a whole block."""

    embed_s: float
    collect_s: float
    advance_s: float
    solve_s: float  # all solves of a block, one after the other
    publish_s: float  # until a block is written, while its worker goes on
    chunk_bytes: int
    bandwidth: float = 5e9  # bytes a second in and out of a node: 40 Gbit/s

    @classmethod
    def measured(cls, figures: dict[str, Any], sequences: int, length: int, width: int) -> "Costs":
        """Chunks of another size cost in proportion to their tokens."""
        seconds = figures["seconds"]
        tokens = figures["sequences"] * figures["length"] / figures["chunks"]
        scale = sequences * length / 16 / tokens
        return cls(
            embed_s=seconds["Embed"] * scale,
            collect_s=seconds["Collect"] * scale,
            advance_s=seconds["Advance"] * scale,
            solve_s=seconds["Solve"],
            publish_s=seconds["Publish"] + seconds["Settle"],
            chunk_bytes=int(sequences * length / 16 * width * 2),
        )


@dataclass
class Simulation:
    plan: Plan
    costs: Costs
    workers: int
    losses_per_hour: float = 0.0  # of each worker
    replaced_after_s: float = 60.0
    seed: int = 0
    now: float = 0.0
    busy_s: float = 0.0
    network_bytes: float = 0.0
    lost: int = 0
    tasks: int = 0
    _queue: list[tuple[float, int, str, Any]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _made_by: dict[str, tuple[int, Assignment]] = field(default_factory=dict)
    _doing: dict[int, tuple[str, float]] = field(default_factory=dict)
    together: dict[int, float] = field(default_factory=dict)  # when a block is put together
    _written_at: dict[int, float] = field(default_factory=dict)  # when it is in the store

    def run(self) -> float:
        """Seconds until the job's last block is published."""
        works = quantization_works(self.plan, (), chunk_bytes=self.costs.chunk_bytes)
        scheduler = Scheduler(works)
        chance = random.Random(self.seed)
        alive = set(range(self.workers))
        hired = itertools.count(self.workers)
        for worker in alive if self.losses_per_hour else ():
            self._at(chance.expovariate(self.losses_per_hour / 3600), "lost", worker)
        instructions = scheduler.handle(Joined(tuple(sorted(alive))))
        while True:
            for instruction in instructions:
                match instruction:
                    case Run(assignment, worker):
                        self._start(assignment, worker)
                    case Release(name):
                        self._made_by.pop(name, None)
                    case Stop(complete):
                        assert complete, "the fleet gave up"
                        return self.now
            self.now, _, what, about = heapq.heappop(self._queue)
            instructions = []
            match what:
                case "done":
                    worker, assignment, seconds = about
                    if worker not in alive:
                        continue
                    del self._doing[worker]
                    missing = {s for s, _ in assignment.inputs if s not in self._made_by}
                    if missing:
                        event: Any = InputsMissing(assignment.id, tuple(sorted(missing)))
                    else:
                        self._made_by[assignment.id] = (worker, assignment)
                        event = Finished(assignment.id, seconds)
                        self.tasks += 1
                    instructions = scheduler.handle(event)
                case "lost" if about in alive:
                    alive.discard(about)
                    self.lost += 1
                    self._doing.pop(about, None)
                    self._made_by = {
                        name: made for name, made in self._made_by.items() if made[0] != about
                    }
                    self._at(self.replaced_after_s, "joined", next(hired))
                    instructions = scheduler.handle(WorkerLost(about))
                case "joined":
                    alive.add(about)
                    self._at(chance.expovariate(self.losses_per_hour / 3600), "lost", about)
                    instructions = scheduler.handle(Joined((about,)))

    def _at(self, seconds: float, what: str, about: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), what, about))

    def _start(self, assignment: Assignment, worker: int) -> None:
        fetched = sum(self._bytes_of(assignment, source, worker) for source in assignment.inputs)
        self.network_bytes += fetched
        seconds = self._compute_s(assignment) + fetched / self.costs.bandwidth
        self.busy_s += seconds
        self._doing[worker] = (assignment.id, self.now)
        self._at(seconds + CALL_S, "done", (worker, assignment, seconds))

    def _compute_s(self, assignment: Assignment) -> float:
        costs = self.costs
        match assignment.task:
            case Embed(chunks):
                return costs.embed_s * len(chunks)
            case Collect(_, chunks):
                return costs.collect_s * len(chunks)
            case Advance(_, chunks):
                return costs.advance_s * len(chunks)
            case Boundary(first, last, chunks):
                return costs.advance_s * len(chunks) * (last - first)
            case Solve() as solve:
                return costs.solve_s * self._share(solve)
            case Publish(block):
                self.together[block] = self.now
                self._written_at[block] = self.now + costs.publish_s  # in a thread
            case Settle(block):
                return max(0.0, self._written_at[block] - self.now)
            case CopyOutside():
                return 2 * costs.publish_s
        return 0.0

    def _share(self, solve: Solve) -> float:
        """Of a block's solves, by the multiplications of rows against columns."""
        groups = self.plan.blocks[solve.block].groups
        whole = sum(
            layer.out_features * float(layer.in_features) ** 2
            for group in groups
            for layer in group.layers
        )
        group = groups[solve.group]
        rows = 0
        for number, tile in solve.tiles:
            first, last = self.plan.row_tiles(group.stacks()[number])[tile]
            rows += last - first
        return rows * float(group.in_features) ** 2 / whole

    def _bytes_of(self, reader: Assignment, source: tuple[str, int], worker: int) -> float:
        """What one input brings over the network: nothing from the worker that made it."""
        made_by, maker = self._made_by.get(source[0], (worker, reader))
        if made_by == worker:
            return 0.0
        match maker.task, reader.task:
            case (Hand() | Boundary(), Take()):
                return float(self.costs.chunk_bytes)
            case Collect() as collect, Solve(block, group):
                return self._triangle(block, group) * _nodes(collect.chunks)
            case Collect() as collect, Reduce(block, group):
                bands = collect.bands[group]
                return self._triangle(block, group) / bands * _nodes(collect.chunks)
            case Reduce(block, group), _:
                bands = sum(1 for s, _ in reader.inputs if s.startswith("reduce/"))
                return self._triangle(block, group) / max(bands, 1)
            case Solve() as solve, Publish() | Advance():
                groups = self.plan.blocks[solve.block].groups
                weights = sum(
                    layer.out_features * layer.in_features for g in groups for layer in g.layers
                )
                return weights * CODES_BYTES * self._share(solve)
        return 0.0

    def _triangle(self, block: int, group: int) -> float:
        width = self.plan.blocks[block].groups[group].in_features
        return width**2 / 2 * FLOAT32


def _nodes(chunks: tuple[int, ...]) -> int:
    """Nodes of the fixed tree that a run of chunks comes to, at least."""
    return max(1, bin(len(chunks)).count("1"))


def make_plan(blocks: int, sequences: int, length: int, shards: int) -> Plan:
    from orchestrator.planning import make_plan as planned
    from orchestrator.planning import plan_layers

    spec = job_spec(
        quantization={"scheme": "int4", "group_size": 128},
        compute_dtype="bfloat16",
        calibration={
            "text": "/t",
            "sequences": sequences,
            "length": length,
            "shards": shards,
        },
    )
    layers, head, faults = plan_layers(spec, architecture(blocks, hidden=4096, inner=14336))
    assert not faults
    return planned(spec, layers, head, {"device": "cuda"})


def splits(gpus: int, blocks: int, chunks: int) -> list[int]:
    """Numbers of shards worth trying for so many GPUs: powers of two that use them all."""
    powers = [1 << power for power in range(11)]
    fitting = [shards for shards in powers if shards <= min(blocks, gpus)]
    return [shards for shards in fitting if gpus / shards <= chunks] or fitting[-1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256, 512, 1024])
    parser.add_argument("--solve-s", type=float, help="in place of the measured seconds a block")
    parser.add_argument("--publish-s", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = json.loads(options.costs.read_text())
    if options.solve_s is not None:
        figures["seconds"]["Solve"] = options.solve_s
    if options.publish_s is not None:
        figures["seconds"] |= {"Publish": options.publish_s, "Settle": 0.0}
    costs = Costs.measured(figures, options.sequences, options.length, 4096)
    rows: list[dict[str, Any]] = []
    alone = Simulation(
        make_plan(options.blocks, options.sequences, options.length, 1), costs, 1
    ).run()
    for gpus in options.gpus:
        plan = make_plan(options.blocks, options.sequences, options.length, 1)
        for shards in splits(gpus, options.blocks, plan.contract.chunks):
            rows.append(_row(options, costs, gpus, shards, alone))
    _show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _row(
    options: argparse.Namespace, costs: Costs, gpus: int, shards: int, alone: float
) -> dict[str, Any]:
    plan = make_plan(options.blocks, options.sequences, options.length, shards)
    quiet = Simulation(plan, costs, gpus)
    seconds = quiet.run()
    rate = 1.0 / gpus * 3600 / max(seconds, 1.0)  # one loss in the time of a quiet run
    troubled = [Simulation(plan, costs, gpus, losses_per_hour=rate, seed=seed) for seed in range(5)]
    extra = [simulation.run() - seconds for simulation in troubled]
    lost = sum(simulation.lost for simulation in troubled)
    return {
        "gpus": gpus,
        "shards": shards,
        "seconds": seconds,
        "efficiency": alone / seconds / gpus,
        "network_gb": quiet.network_bytes / 1e9,
        "tasks": quiet.tasks,
        "seconds_per_loss": sum(extra) / lost if lost else None,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("GPUs", "shards", "seconds", "efficiency", "network GB", "tasks", "s per loss")
    for row in rows:
        loss = row["seconds_per_loss"]
        table.add_row(
            str(row["gpus"]),
            str(row["shards"]),
            f"{row['seconds']:.0f}",
            f"{row['efficiency']:.2f}",
            f"{row['network_gb']:.1f}",
            str(row["tasks"]),
            "" if loss is None else f"{loss:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
