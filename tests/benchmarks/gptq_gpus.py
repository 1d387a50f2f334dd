"""GPTQ on several GPUs of one machine: one job on 1, 2, 4 ... replicas, and on shards of replicas.

    python -m tests.benchmarks.gptq_gpus --shape llama-8b --json OUT
    python -m tests.benchmarks.gptq_gpus --device cpu --shape smollm2-135m --counts 1 2

Random weights, W4A16 symmetric in groups of 128, random ids. Every job runs in a process of its
own, on an embedded Ray with a worker for each GPU. Told of each:

    s a block    by the clock, from the first block put together to the last, over the blocks after
                 the first; of shards, what one more costs: of a job of all blocks and one of half
    efficiency   of one replica's, over the number of workers
    bound        the same, were all but the factorizations and the writing spread evenly and nobody
                 waited: from the parts that one replica's blocks were spent on
    simulated    seconds a block that the scheduler comes to (simulate.py) with the costs of one
                 replica's tasks, and the rate of a copy from GPU to GPU
    job          seconds from when the workers are there to the last block's file
    states       where hidden states are: on the host where a GPU has no room for them, which
                 costs time that several GPUs need not spend
    moved        bytes that workers had from others, over the blocks; waiting: worker-seconds of
                 the whole job, over the blocks
    same         whether all files of the artifact are those of the fewest workers, to the byte;
                 shards are fixed when a job is planned, and other shards give other bytes

Then the job of most replicas again, of which one is killed in the midst of a block.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.block_costs import SHAPES, give_tokenizer, save_random_model
from tests.benchmarks.gptq_gpu import _machine, _write_ids
from tests.benchmarks.scaling import MEMORY_BANDWIDTH

Config = tuple[int, int]  # shards, and replicas of each
SPREAD = ("read", "forward", "hessian", "solve", "pack")  # over replicas; the rest is not


def main() -> None:
    options = _options()
    if options.job:
        print(json.dumps(_job(options)))
        return
    counts = options.counts or _powers(_gpus(options.device))
    split = [(s, count // s) for s in options.shards for count in counts if count >= s]
    configs: list[Config] = sorted(split, key=lambda config: config[0])
    results: dict[str, Any] = {"machine": _told_machine(options.device), "shape": options.shape}
    results |= {"blocks": options.blocks, "copy_bytes_per_s": _copy_rate(options.device)}
    results |= {"sequences": options.sequences, "length": options.length}
    rows: list[dict[str, Any]] = []
    results["rows"] = rows
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = _Bench(options, Path(scratch), results)
        for config, kill in [*((c, False) for c in configs), ((1, max(counts)), True)]:
            rows.append(bench.row(config, kill=kill))
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    _print(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


class _Bench:
    def __init__(self, options: argparse.Namespace, folder: Path, results: dict[str, Any]) -> None:
        self._options, self._folder, self._results = options, folder, results
        self._costs: dict[str, Any] | None = None  # of one replica's tasks
        dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
        for blocks in (options.blocks // 2, options.blocks):
            save_random_model(folder / f"model-{blocks}", options.shape, blocks, dtype)
            give_tokenizer(folder / f"model-{blocks}")
        _write_ids(folder / "ids.jsonl", options.sequences, options.length)

    def row(self, config: Config, *, kill: bool = False) -> dict[str, Any]:
        blocks = self._options.blocks
        whole = self._told(config, blocks, kill)
        self._costs = self._costs or whole.get("costs")
        row = {"shards": config[0], "replicas": config[1], "kill": kill, "job": whole}
        if "error" in whole or kill:
            return row
        if config[0] > 1:
            half = self._told(config, blocks // 2, kill)
            if "error" in half:
                return row | {"job": half}
            seconds = whole["phases"]["quantize"] - half["phases"]["quantize"]
            simulated = whole["simulated_s"] - half["simulated_s"]
            more = blocks - blocks // 2
            return row | {"block_s": seconds / more, "simulated_s": simulated / more}
        row["simulated_s"] = _each(whole["simulated_together_s"])
        return row | {"block_s": _each(whole["together_s"])}

    def _told(self, config: Config, blocks: int, kill: bool) -> dict[str, Any]:
        job = _write_job(self._options, self._folder, blocks, config)
        command = [sys.executable, "-m", "tests.benchmarks.gptq_gpus", "--job", str(job)]
        command += ["--kill"] if kill else []
        if self._costs:
            costs = self._costs | {"bandwidth": self._results["copy_bytes_per_s"]}
            command += ["--costs", json.dumps(costs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told: dict[str, Any]
        if done.returncode:
            told = {"error": f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"}
            print(f"{config}:\n{told['error']}", flush=True)
        else:
            told = json.loads(done.stdout.strip().splitlines()[-1])
            line = {"config": config, "blocks": blocks, "kill": kill, **told}
            print(json.dumps(line), flush=True)
        return told


def _each(moments: list[float]) -> float:
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def _parts(row: dict[str, Any]) -> dict[str, float]:
    """Worker-seconds a block by part, of all blocks but the first."""
    later = [block["seconds"] for block in row["job"]["blocks"][1:]]
    return {
        part: sum(block.get(part, 0.0) for block in later) / len(later)
        for part in {part for block in later for part in block}
    }


def _print(results: dict[str, Any]) -> None:
    rows = results["rows"]
    one = next((row for row in rows if (row["shards"], row["replicas"]) == (1, 1)), rows[0])
    if "error" in one["job"]:
        raise SystemExit("one replica has failed: nothing to compare with")
    alone = _parts(one)
    spread = sum(alone.get(part, 0.0) for part in SPREAD)
    rest = sum(alone.get(part, 0.0) for part in ("factor", "write"))
    table = Table(title=f"{results['shape']}, {results['sequences']} x {results['length']}")
    heads = ("shards", "replicas", "s a block", "efficiency", "bound", "simulated", "job, s")
    for head in (*heads, "moved, GB", "waiting, s", "states", "same"):
        table.add_column(head, justify="right")
    for row in rows:
        place = [str(row["shards"]), str(row["replicas"])]
        job, workers = row["job"], row["shards"] * row["replicas"]
        if "error" in job:
            table.add_row(*place, "failed")
            continue
        first = next(r for r in rows if r["shards"] == row["shards"] and "error" not in r["job"])
        same = "-" if row is first else "yes" if job["digest"] == first["job"]["digest"] else "NO"
        seconds = job["phases"]["quantize"]
        if row["kill"]:
            usual = next(r for r in rows if r["replicas"] == row["replicas"] and r["shards"] == 1)
            row["delay_s"] = seconds - usual["job"]["phases"]["quantize"]
            told = f"{len(job['lost'])} killed: {row['delay_s']:+.1f} s"
            table.add_row(*place, told, "", "", "", f"{seconds:.1f}", "", "", "", same)
            continue
        row["efficiency"] = one["block_s"] / row["block_s"] / workers
        row["bound"] = (spread + rest) / (spread / workers + rest) / workers
        row["waiting_s"] = job["total"]["seconds"].get("waiting", 0.0) / results["blocks"]
        row["moved_bytes"] = job["received_bytes"] / results["blocks"]
        cells = [f"{row['block_s']:.3f}", f"{row['efficiency']:.2f}", f"{row['bound']:.2f}"]
        cells += [f"{row['simulated_s']:.3f}", f"{seconds:.1f}"]
        cells += [f"{row['moved_bytes'] / 1e9:.2f}", f"{row['waiting_s']:.2f}", job["states_on"]]
        table.add_row(*place, *cells, same)
    Console(width=120).print(table)


def _write_job(options: argparse.Namespace, folder: Path, blocks: int, config: Config) -> Path:
    shutil.rmtree(folder / "store", ignore_errors=True)
    group = 64 if options.shape == "smollm2-135m" else 128
    job = {
        "name": "gptq",
        "model": {"path": str(folder / f"model-{blocks}")},
        "quantization": {"scheme": "int4", "group_size": group, "method": "gptq"},
        "calibration": {
            "jsonl": str(folder / "ids.jsonl"),
            "field": "input_ids",
            "sequences": options.sequences,
            "length": options.length,
            "shards": config[0],
        },
        "workers": {"count": config[0] * config[1], "kind": options.device},
        "output": {"store": str(folder / "store")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _job(options: argparse.Namespace) -> dict[str, Any]:
    """One job, on an embedded Ray of its own."""
    from orchestrator.checks import check
    from orchestrator.driver import run_job
    from orchestrator.executors import Result
    from orchestrator.loop import Observer
    from orchestrator.scheduler import Assignment
    from orchestrator.site import Site
    from tests.benchmarks.simulate import Costs, Simulation
    from workers.tasks import Publish

    path: Path = options.job
    told: dict[str, Any] = {"lost": [], "together_s": [], "tasks": {}}
    told |= {"received_bytes": 0, "received_s": 0.0}
    middle: list[str] = []

    class Watch(Observer):
        def submitted(self, assignment: Assignment, worker: int) -> None:
            if options.kill and not middle and assignment.id.startswith("solve/1/"):
                middle.append(assignment.id)
                ours = psutil.Process().children(recursive=True)
                next(c for c in ours if c.name().startswith("ray::RayWorker")).kill()

        def finished(self, assignment: Assignment, result: Result) -> None:
            received = result.summary.get("received", {"bytes": 0, "seconds": 0.0})
            told["received_bytes"] += received["bytes"]
            told["received_s"] += received["seconds"]
            kind = type(assignment.task).__name__
            if getattr(assignment.task, "block", 1):  # the first one warms up
                told["tasks"][kind] = told["tasks"].get(kind, 0.0) + result.seconds
            if isinstance(assignment.task, Publish):
                told["together_s"].append(time.perf_counter() - start)

        def note(self, event: str, **words: Any) -> None:
            if event == "worker lost":
                told["lost"].append(words["why"])

    prepared = check(path)
    start = time.perf_counter()
    result = run_job(prepared, lambda plan: Site().start_workers(plan, prepared), Watch())
    told["seconds"] = time.perf_counter() - start
    model = Path(yaml.safe_load(path.read_text())["output"]["store"]) / "gptq" / "model"
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    profile = result.report["profile"]
    given = json.loads(options.costs) if options.costs else None
    costs = Costs(**given) if given else _costs(prepared, told["tasks"], profile)
    simulation = Simulation(prepared.plan, costs, prepared.workers)
    return {
        **told,
        "costs": asdict(costs),
        "digest": digest.hexdigest(),
        "simulated_s": simulation.run(),
        "simulated_together_s": sorted(simulation.together.values()),
        "states_on": prepared.prediction.states_on,
        "blocks": profile["blocks"],
        "total": profile["total"],
        "phases": result.report["seconds"],
    }


def _costs(prepared: Any, tasks: dict[str, float], profile: dict[str, Any]) -> Any:
    """Of one worker's tasks, by their seconds in all blocks but the first."""
    from orchestrator.driver import chunk_bytes
    from tests.benchmarks.simulate import Costs

    later = len(prepared.plan.blocks) - 1
    chunks = prepared.plan.contract.chunks
    return Costs(
        embed_s=tasks["Embed"] / chunks,
        collect_s=tasks["Collect"] / later / chunks,
        advance_s=tasks["Advance"] / max(later - 1, 1) / chunks,
        solve_s=tasks["Solve"] / later,
        publish_s=sum(block["hidden"].get("write", 0.0) for block in profile["blocks"]) / later,
        chunk_bytes=chunk_bytes(prepared),
    )


def _copy_rate(device: str) -> float:
    """Bytes a second from one GPU to another; between processes on a CPU, as scaling.py has it."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        return MEMORY_BANDWIDTH
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    target = source.to("cuda:1")
    torch.cuda.synchronize(1)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    rate = 10 * source.nbytes / (time.perf_counter() - start)
    del source, target
    torch.cuda.empty_cache()
    return rate


def _gpus(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _told_machine(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    return {**_machine(), "gpus": torch.cuda.device_count()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--counts", type=int, nargs="+", help="of replicas; as many as GPUs allow")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--costs", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
