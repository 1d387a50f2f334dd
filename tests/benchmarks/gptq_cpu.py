"""GPTQ on two cores: quantfleet beside llm-compressor, same token ids, same evaluation, one run.

    python -m tests.benchmarks.gptq_cpu --model FOLDER --calibration FILE --evaluation FILE \
        --peer-python PEER/bin/python

Protocol: W4A16 symmetric, groups of 64; S windows of L tokens, evenly spaced over the first
4,000,000 characters of the calibration text, shifted by a fraction of their stride for each
calibration offset; token perplexity without BOS on the first 8,192 tokens of the evaluation text
in windows of 1,024, float32. The peer's clock covers oneshot alone; ours covers the whole
quantization phase, reading the weights and publishing the artifact included. Two threads each:
ours as two workers of one thread.

The peer runs in an environment of its own (llmcompressor==0.14.0.1). With `--kind cuda` ours runs
in this process on a GPU instead, to see what that does to the perplexity.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from tests.benchmarks.perplexity import perplexity
from workers.store import open_store

CHARACTERS = 4_000_000
PEER = Path(__file__).with_name("peer_llmcompressor.py")


def main() -> None:
    options = _options()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.calibration.read_text()[:CHARACTERS], verbose=False)["input_ids"]
    heldout = tokenizer(options.evaluation.read_text()[: 8192 * 6], verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    base = perplexity(model, heldout)
    del model
    results: dict[str, Any] = {"machine": _machine(), "perplexity_original": base, "runs": []}
    print(f"original {base:.3f}", flush=True)
    for offset in range(options.offsets):
        rows = windows(ids, options.sequences, options.length, offset, options.offsets)
        with tempfile.TemporaryDirectory() as scratch:
            run = _one_offset(options, Path(scratch), rows, heldout)
        results["runs"].append({"offset": offset, **run})
        print(json.dumps(results["runs"][-1]), flush=True)
    for side in ("ours", "peer"):
        runs = [run[side] for run in results["runs"] if side in run]
        if not runs:
            continue
        values = [run["perplexity"] for run in runs]
        results[side] = {
            "mean_perplexity": statistics.fmean(values),
            "stdev_perplexity": statistics.stdev(values) if len(values) > 1 else None,
            "median_seconds": statistics.median(run["seconds"] for run in runs),
        }
        print(side, json.dumps(results[side]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def windows(
    ids: list[int], sequences: int, length: int, offset: int = 0, offsets: int = 1
) -> list[list[int]]:
    """Evenly spaced over the ids; each offset moves them by the same part of their distance."""
    stride = (len(ids) - length) // sequences
    shift = offset * stride // max(offsets, 1)
    starts = (shift + index * stride for index in range(sequences))
    return [ids[start : start + length] for start in starts]


def _one_offset(
    options: argparse.Namespace, scratch: Path, rows: list[list[int]], heldout: list[int]
) -> dict[str, Any]:
    calibration = scratch / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    run = {"ours": _ours(options, scratch, calibration)}
    if options.peer_python:
        run["peer"] = _peer(options, scratch, calibration)
    for side, result in run.items():
        model = AutoModelForCausalLM.from_pretrained(scratch / side, dtype=torch.float32).eval()
        result["perplexity"] = perplexity(model, heldout)
    return run


def _ours(options: argparse.Namespace, scratch: Path, calibration: Path) -> dict[str, Any]:
    job = {
        "name": "bench",
        "model": {"path": str(options.model)},
        "quantization": {"scheme": "int4", "group_size": 64, **json.loads(options.quantization)},
        "compute_dtype": options.compute_dtype,
        "calibration": {
            "jsonl": str(calibration),
            "field": "input_ids",
            "sequences": options.sequences,
            "length": options.length,
            "shards": options.shards,
        },
        "workers": {"count": 2, "threads": 1, "kind": "cpu"},
        "output": {"store": str(scratch / "store")},
    }
    file = scratch / "job.yaml"
    if options.kind != "cpu":
        job["workers"] = {"count": 1, "kind": options.kind}
        file.write_text(yaml.safe_dump(job))
        report = _in_this_process(file)
        fetch(open_store(f"{scratch}/store/bench"), scratch / "ours")
        return {"seconds": report["seconds"]["quantize"], "spent": report["profile"]["total"]}
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "orchestrator", "run", str(file), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)["report"]
    fetch(open_store(f"{scratch}/store/bench"), scratch / "ours")
    return {"seconds": report["seconds"]["quantize"], "spent": report["profile"]["total"]}


def _in_this_process(file: Path) -> Any:
    prepared = check(file)
    devices = prepared.team.devices
    return run_job(prepared, lambda plan: InProcessExecutor(plan, devices), Observer()).report


def _peer(options: argparse.Namespace, scratch: Path, calibration: Path) -> dict[str, Any]:
    command = [options.peer_python, str(PEER), str(options.model), str(calibration)]
    done = subprocess.run(
        [*command, str(scratch / "peer")], stdout=subprocess.PIPE, check=True, cwd=scratch
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "compressed-tensors")
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "python": platform.python_version()} | {p: version(p) for p in packages}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--peer-python", help="leave out to run our side alone")
    parser.add_argument("--offsets", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shards", type=int, default=1, help="of our side: runs of blocks")
    parser.add_argument("--compute-dtype", default="auto", help="of our side")
    parser.add_argument("--kind", choices=["cpu", "cuda"], default="cpu", help="of our side")
    parser.add_argument("--quantization", default="{}", help="more keys of the section, as JSON")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
