"""GPTQ on one GPU: quantfleet beside llm-compressor, same model and token ids, one run.

    python -m tests.benchmarks.gptq_gpu --peer-python PEER/bin/python --json OUT

Random weights of a model's widths, W4A16 symmetric in groups of 128, bfloat16. Each side quantizes
models of few and of more blocks from few and from more sequences of 2,048 tokens, every run in a
process of its own that has done the like once before the clock starts. Told is what one more block
costs, from the difference of few and many, everything included: ours is the clock of a whole job,
from its check to its manifest (of several jobs, in that process, the median); the peer's covers one
oneshot alone, neither load nor save. Of ours it is also told what it was spent on.

The error of both: trace((W-Q) H (W-Q)^T) over trace(W H W^T) of each linear of the first block, H
from the same calibration inputs, and how far the last block's outputs are moved on some of them.
The peer runs in an environment of its own (llmcompressor==0.14.0.1); without it, ours runs alone.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from quantcore.formats import FORMATS
from quantcore.schemes import Scheme
from tests.benchmarks.block_costs import SHAPES, VOCABULARY, give_tokenizer, save_random_model
from workers.blocks import BlockModel, linears_of, run_block
from workers.sources import open_source

PEER = Path(__file__).with_name("peer_llmcompressor.py")
SCHEME = Scheme(name="int4", group_size=128)
ERROR_SEQUENCES = 16


def main() -> None:
    options = _options()
    if options.job:
        print(json.dumps(_job(options.job, options.repeats)))
        return
    results: dict[str, Any] = {"machine": _machine(), "shape": options.shape, "runs": []}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        for blocks in options.blocks:
            save_random_model(folder / f"model-{blocks}", options.shape, blocks, torch.bfloat16)
            give_tokenizer(folder / f"model-{blocks}")
        for sequences in options.sequences:
            _write_ids(folder / f"ids-{sequences}.jsonl", sequences, options.length)
        for side in ("ours", "peer") if options.peer_python else ("ours",):
            for sequences in options.sequences:
                for blocks in options.blocks:
                    told = _run(options, folder, side, blocks, sequences)
                    run = {"side": side, "blocks": blocks, "sequences": sequences, **told}
                    results["runs"].append(run)
                    print(json.dumps(run), flush=True)
    results["marginal"] = list(_marginal(results["runs"]))
    print(json.dumps(results["marginal"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def _run(
    options: argparse.Namespace, folder: Path, side: str, blocks: int, sequences: int
) -> dict[str, Any]:
    model, ids = folder / f"model-{blocks}", folder / f"ids-{sequences}.jsonl"
    environment = dict(os.environ)
    out = folder / f"{side}-out"
    shutil.rmtree(out, ignore_errors=True)
    if side == "ours":
        job = _write_job(folder, model, ids, options.length)
        command = [sys.executable, "-m", "tests.benchmarks.gptq_gpu", "--job", str(job)]
        command += ["--repeats", str(options.repeats)]
    else:
        command = [options.peer_python, str(PEER), str(model), str(ids), str(out)]
        command += ["--device", "cuda", "--dtype", "bfloat16", "--group", "128", "--threads", "8"]
        command += ["--warm-up", "16"]
        environment["PYTHONPATH"] = options.peer_path or environment.get("PYTHONPATH", "")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if blocks == min(options.blocks):
        artifact = folder / "store" / "gptq" / "model" if side == "ours" else out
        told |= _errors(model, ids, artifact)
    return told


def _write_job(folder: Path, model: Path, ids: Path, length: int) -> Path:
    shutil.rmtree(folder / "store", ignore_errors=True)
    job = {
        "name": "gptq",
        "model": {"path": str(model)},
        "quantization": {"scheme": "int4", "group_size": 128, "method": "gptq"},
        "compute_dtype": "bfloat16",
        "calibration": {
            "jsonl": str(ids),
            "field": "input_ids",
            "sequences": len(ids.read_text().splitlines()),
            "length": length,
        },
        "workers": {"count": 1, "kind": "cuda"},
        "output": {"store": str(folder / "store")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _job(path: Path, repeats: int) -> dict[str, Any]:
    """A job of ours, on one worker in this process: the median of several by their seconds."""
    from orchestrator.checks import check
    from orchestrator.driver import run_job
    from orchestrator.executors import InProcessExecutor
    from orchestrator.loop import Observer

    def run() -> tuple[dict[str, Any], dict[str, float]]:
        start = time.perf_counter()
        prepared = check(path)
        checked = time.perf_counter()
        result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cuda"]), Observer())
        torch.cuda.synchronize()
        end = time.perf_counter()
        return result.report, {"seconds": end - start, "check": checked - start}

    run()  # libraries are imported and loaded, kernels compiled
    store = Path(yaml.safe_load(path.read_text())["output"]["store"])
    runs = []
    for _ in range(repeats):
        shutil.rmtree(store)
        gc.collect()  # the job before it, which a process of its own would not have
        torch.cuda.reset_peak_memory_stats()
        runs.append(run())
    report, seconds = sorted(runs, key=lambda one: one[1]["seconds"])[len(runs) // 2]
    return {
        **seconds,
        "all_seconds": [round(told["seconds"], 3) for _, told in runs],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "phases": report["seconds"],
        "spent": report["profile"]["total"]["seconds"],
        "tasks": {kind: told["total"] for kind, told in report["task_seconds"].items()},
    }


@torch.no_grad()
def _errors(model: Path, ids: Path, artifact: Path) -> dict[str, Any]:
    """Of the first block's linears by the Hessian, and of the last block's output."""
    source = open_source(model)
    blocks = BlockModel(source, torch.bfloat16, "cuda")
    lines = ids.read_text().splitlines()[:ERROR_SEQUENCES]
    rows_BL = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    inputs = [blocks.embed(row_L[None]) for row_L in rows_BL]
    weights = _decoded(artifact)
    first, prefix = blocks.block(0), blocks.prefix(0)
    linears = {prefix + name: linear for name, linear in linears_of(first)}
    sums = {
        name: torch.zeros(linear.in_features, linear.in_features, device="cuda")
        for name, linear in linears.items()
    }
    for name, linear in linears.items():

        def add(_module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            x_TI = args[0].flatten(0, -2).float()
            sums[name].addmm_(x_TI.t(), x_TI)

        linear.register_forward_pre_hook(add)
    for batch in inputs:
        run_block(first, batch.calls[0], batch.hidden_BLH)
    relative = {}
    for name, linear in linears.items():
        w_OI = linear.weight.float()
        delta_OI = w_OI - weights[f"{name}.weight"].float()
        h_II = sums[name]
        lost = ((delta_OI @ h_II) * delta_OI).sum(dtype=torch.float64)
        relative[name] = float(lost / ((w_OI @ h_II) * w_OI).sum(dtype=torch.float64))
    moved, whole = 0.0, 0.0
    plain = [blocks.block(index) for index in range(len(blocks))]
    rounded = [_replaced(blocks, index, weights) for index in range(len(blocks))]
    for batch in inputs:
        one = two = batch.hidden_BLH
        for index in range(len(blocks)):
            one = run_block(plain[index], batch.calls[index], one)
            two = run_block(rounded[index], batch.calls[index], two)
        moved += float((one.float() - two.float()).square().sum())
        whole += float(one.float().square().sum())
    return {"objective": relative, "output_error": (moved / whole) ** 0.5}


def _replaced(blocks: BlockModel, index: int, weights: dict[str, Tensor]) -> Any:
    names = blocks.block_tensors(index)
    return blocks.block(index, {name: weights[name] for name in names if name in weights})


def _decoded(artifact: Path) -> dict[str, Tensor]:
    """The quantized linears of an artifact in the compressed-tensors format, as weights."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(artifact.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cuda") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensors[name] = opened.get_tensor(name)
    decode = FORMATS["compressed-tensors"].decode
    weights = {}
    for name in [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]:
        own = f"{name}."
        parts = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
        width = int(parts["weight_shape"][1])
        weights[f"{name}.weight"] = decode(parts, SCHEME, width).bfloat16()
    return weights


def _marginal(runs: list[dict[str, Any]]) -> Any:
    """By side and sequences: what one more block costs."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault((run["side"], run["sequences"]), {})[run["blocks"]] = run
    costs, parts = {}, {}
    for key, by_blocks in found.items():
        few, many = min(by_blocks), max(by_blocks)
        if few == many:
            continue
        less, more = by_blocks[few], by_blocks[many]
        costs[key] = (more["seconds"] - less["seconds"]) / (many - few)
        before = less.get("spent", {})
        spent = more.get("spent", {})
        parts[key] = {p: round((s - before.get(p, 0)) / (many - few), 4) for p, s in spent.items()}
    for (side, sequences), block_s in costs.items():
        line = {"side": side, "sequences": sequences, "block_s": block_s}
        if side == "ours":
            line["spent"] = parts[side, sequences]
        if side == "ours" and ("peer", sequences) in costs:
            line["peer_over_ours"] = costs["peer", sequences] / block_s
        yield line


def _write_ids(path: Path, sequences: int, length: int) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length))
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))


def _machine() -> dict[str, str]:
    packages = ("torch", "triton", "transformers")
    return {"device": torch.cuda.get_device_name(), **{p: version(p) for p in packages}}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="jobs of ours in one process")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-path", help="PYTHONPATH of the peer, if not this one's")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
