"""Where a GPU's time goes in a GPTQ job, kernel by kernel, and how long it has nothing to do.

    python -m tests.benchmarks.gptq_trace --shape llama-8b --blocks 2 4 --sequences 512

Jobs as gptq_gpu.py times them, of few and of more blocks, under torch's profiler. Told is what
one more block adds: milliseconds and calls of each kernel, copy and fill; how long none ran.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from tests.benchmarks.block_costs import SHAPES, give_tokenizer, save_random_model
from tests.benchmarks.gptq_gpu import _write_ids, _write_job

SHOWN = 90  # characters of a kernel's name


@dataclass(slots=True)
class Trace:
    ms: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    idle_ms: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=30)
    options = parser.parse_args()
    few, many = (_traced(options, blocks) for blocks in sorted(options.blocks))
    more = abs(options.blocks[1] - options.blocks[0])
    ms = Counter({name: (many.ms[name] - few.ms[name]) / more for name in many.ms})
    for name, each in ms.most_common(options.rows):
        print(f"{each:9.2f} {(many.calls[name] - few.calls[name]) / more:8.1f}  {name}")
    idle = (many.idle_ms - few.idle_ms) / more
    print(f"{ms.total():9.2f} ms a block in kernels, copies and fills, {idle:.2f} ms without any")


def _traced(options: argparse.Namespace, blocks: int) -> Trace:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_model(folder / "model", options.shape, blocks, torch.bfloat16)
        give_tokenizer(folder / "model")
        _write_ids(folder / "ids.jsonl", options.sequences, options.length)
        job = _write_job(folder, folder / "model", folder / "ids.jsonl", options.length)
        _run(job)  # kernels are compiled
        shutil.rmtree(yaml.safe_load(job.read_text())["output"]["store"])
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            _run(job)
    trace, spans = Trace(), []
    for event in traced.events() or ():
        if event.device_type == DeviceType.CUDA:
            name = event.name[:SHOWN]
            trace.ms[name] += event.time_range.elapsed_us() / 1e3
            trace.calls[name] += 1
            spans.append((event.time_range.start, event.time_range.end))
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    trace.idle_ms = (last - first - _covered(spans)) / 1e3
    return trace


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
