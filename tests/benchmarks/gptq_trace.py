"""Where a GPU's time goes in a GPTQ job, kernel by kernel, and how long it has nothing to do.

    python -m tests.benchmarks.gptq_trace --shape llama-8b --blocks 2 --sequences 512

A job as gptq_gpu.py times it, under torch's profiler. Of each kernel told: milliseconds and calls
per block. Idle is what no kernel, copy or fill covers, from the first to the last of them.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from tests.benchmarks.block_costs import SHAPES, give_tokenizer, save_random_model
from tests.benchmarks.gptq_gpu import _write_ids, _write_job

SHOWN = 90  # characters of a kernel's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=45)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_model(folder / "model", options.shape, options.blocks, torch.bfloat16)
        give_tokenizer(folder / "model")
        _write_ids(folder / "ids.jsonl", options.sequences, options.length)
        job = _write_job(folder, folder / "model", folder / "ids.jsonl", options.length)
        _run(job)
        shutil.rmtree(yaml.safe_load(job.read_text())["output"]["store"])
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            _run(job)
    spent, calls = Counter[str](), Counter[str]()
    spans = []
    for event in traced.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name[:SHOWN]
            spent[name] += event.time_range.elapsed_us()
            calls[name] += 1
            spans.append((event.time_range.start, event.time_range.end))
    for name, us in spent.most_common(options.rows):
        print(f"{us / 1e3 / options.blocks:9.2f} {calls[name] / options.blocks:8.1f}  {name}")
    busy, whole = _covered(spans), max(end for _, end in spans) - min(start for start, _ in spans)
    print(f"{busy / 1e3 / options.blocks:9.2f} ms a block busy, {(whole - busy) / 1e3:.2f} ms idle")


def _run(job: Path) -> None:
    run_job(check(job), lambda plan: InProcessExecutor(plan, ["cuda"]), Observer())
    torch.cuda.synchronize()


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


if __name__ == "__main__":
    main()
