"""GPTQ on several GPUs of one machine: one job on 1, 2, 4 ... replicas, and on shards of replicas.

    python -m tests.benchmarks.gptq_gpus --shape llama-8b --json OUT
    python -m tests.benchmarks.gptq_gpus --device cpu --shape smollm2-135m --counts 1 2

Random weights, W4A16 symmetric in groups of 128, random ids. Every job runs in a process of its
own, on an embedded Ray with a worker for each GPU. Told of each:

    s a block    what one more costs: of a job of more blocks and one of fewer, by the clock, from
                 when the workers are there to the last block's file
    efficiency   of one replica's, over the number of workers
    bound        the same, were all but the factorizations and the writing spread evenly and nobody
                 waited: from the parts that one replica's blocks were spent on
    simulated    what the scheduler does with its own run's costs (simulate.py)
    moved        bytes a block that workers had from others; waiting: worker-seconds a block
    same         whether all files of the artifact are those of one replica, to the byte

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
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.block_costs import SHAPES, give_tokenizer, save_random_model
from tests.benchmarks.gptq_gpu import _machine, _write_ids

Config = tuple[int, int]  # shards, and replicas of each
SPREAD = ("read", "forward", "hessian", "solve", "pack")  # over replicas; the rest is not


def main() -> None:
    options = _options()
    if options.job:
        print(json.dumps(_job(options.job, options.kill)))
        return
    counts = options.counts or _powers(_gpus(options.device))
    configs: list[Config] = [(1, count) for count in counts]
    configs += [(shards, max(counts) // shards) for shards in (2, 4) if shards < max(counts)]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        for blocks in options.blocks:
            dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
            save_random_model(folder / f"model-{blocks}", options.shape, blocks, dtype)
            give_tokenizer(folder / f"model-{blocks}")
        _write_ids(folder / "ids.jsonl", options.sequences, options.length)
        rows = [_row(options, folder, config) for config in configs]
        rows.append(_row(options, folder, (1, max(counts)), kill=True))
    results = {"machine": _told_machine(options.device), "shape": options.shape}
    results |= {"sequences": options.sequences, "length": options.length, "rows": rows}
    _print(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def _row(
    options: argparse.Namespace, folder: Path, config: Config, *, kill: bool = False
) -> dict[str, Any]:
    few, many = min(options.blocks), max(options.blocks)
    runs = {}
    for blocks in (many,) if kill else (few, many):
        job = _write_job(options, folder, blocks, config)
        command = [sys.executable, "-m", "tests.benchmarks.gptq_gpus", "--job", str(job)]
        done = subprocess.run(
            [*command, *(["--kill"] if kill else [])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{config}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        runs[blocks] = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps({"config": config, "blocks": blocks, "kill": kill, **runs[blocks]}))
    row = {"shards": config[0], "replicas": config[1], "kill": kill, "many": runs[many]}
    if kill:
        return row
    apart = many - few

    def marginal(of: Any) -> float:
        return float(of(runs[many]) - of(runs[few])) / apart

    parts = {*runs[many]["spent"], *runs[few]["spent"]}
    return row | {
        "block_s": marginal(lambda run: run["phases"]["quantize"]),
        "simulated_s": marginal(lambda run: run["simulated_s"]),
        "moved_bytes": marginal(lambda run: run["received_bytes"]),
        "spent": {
            part: marginal(lambda run, part=part: run["spent"].get(part, 0.0)) for part in parts
        },
    }


def _print(results: dict[str, Any]) -> None:
    rows = results["rows"]
    one = next(row for row in rows if row["shards"] * row["replicas"] == 1)
    spread = sum(one["spent"].get(part, 0.0) for part in SPREAD)
    rest = sum(one["spent"].get(part, 0.0) for part in ("factor", "write"))
    table = Table(title=f"{results['shape']}, {results['sequences']} x {results['length']}")
    heads = ("shards", "replicas", "s a block", "efficiency", "bound", "simulated")
    for head in (*heads, "moved, GB", "waiting, s", "same"):
        table.add_column(head, justify="right")
    for row in rows:
        workers = row["shards"] * row["replicas"]
        same = "yes" if row["many"]["digest"] == one["many"]["digest"] else "NO"
        if row["kill"]:
            usual = next(r for r in rows if r["replicas"] == row["replicas"] and r["shards"] == 1)
            delay = row["many"]["phases"]["quantize"] - usual["many"]["phases"]["quantize"]
            lost = len(row["many"]["lost"])
            table.add_row("1", str(workers), f"{lost} killed: {delay:+.1f} s", *["-"] * 5, same)
            continue
        row["efficiency"] = one["block_s"] / row["block_s"] / workers
        row["bound"] = (spread + rest) / (spread / workers + rest) / workers
        simulated = one["simulated_s"] / row["simulated_s"] / workers
        cells = (row["efficiency"], row["bound"], simulated, row["moved_bytes"] / 1e9)
        waiting = row["spent"].get("waiting", 0.0)
        figures = [f"{row['block_s']:.3f}", *(f"{cell:.2f}" for cell in cells), f"{waiting:.2f}"]
        table.add_row(str(row["shards"]), str(row["replicas"]), *figures, same)
    Console(width=110).print(table)


def _write_job(options: argparse.Namespace, folder: Path, blocks: int, config: Config) -> Path:
    shutil.rmtree(folder / "store", ignore_errors=True)
    job = {
        "name": "gptq",
        "model": {"path": str(folder / f"model-{blocks}")},
        "quantization": {"scheme": "int4", "group_size": 128, "method": "gptq"},
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
    if options.shape == "smollm2-135m":
        job["quantization"]["group_size"] = 64
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _job(path: Path, kill: bool) -> dict[str, Any]:
    """One job, on an embedded Ray of its own."""
    from orchestrator.checks import check
    from orchestrator.driver import run_job
    from orchestrator.executors import Result
    from orchestrator.loop import Observer
    from orchestrator.scheduler import Assignment
    from orchestrator.site import Site
    from tests.benchmarks.scaling import costs_of
    from tests.benchmarks.simulate import Simulation

    told: dict[str, Any] = {"received_bytes": 0, "lost": []}
    middle: list[str] = []

    class Watch(Observer):
        def submitted(self, assignment: Assignment, worker: int) -> None:
            if kill and not middle and assignment.id.startswith("solve/1/"):
                middle.append(assignment.id)
                ours = psutil.Process().children(recursive=True)
                next(c for c in ours if c.name().startswith("ray::RayWorker")).kill()

        def finished(self, assignment: Assignment, result: Result) -> None:
            told["received_bytes"] += result.summary.get("received_bytes", 0)

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
    costs = costs_of(prepared, result.report)
    return {
        **told,
        "digest": digest.hexdigest(),
        "simulated_s": Simulation(prepared.plan, costs, prepared.workers).run(),
        "spent": result.report["profile"]["total"]["seconds"],
        "phases": result.report["seconds"],
    }


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
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--counts", type=int, nargs="+", help="of replicas; as many as GPUs allow")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
