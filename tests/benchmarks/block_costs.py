"""What one decoder block costs a worker: the figures that the fleet simulation runs on.

    python -m tests.benchmarks.block_costs --device cuda --sequences 128 --length 2048 --json OUT

A model of Llama-3.1-8B's widths with random weights and few blocks is quantized in one process,
and the seconds of every kind of task are printed, per chunk or per block. Random weights take as
long as trained ones. The first block is left out: it pays for warming up.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor, Result
from orchestrator.loop import Observer
from orchestrator.scheduler import Assignment
from workers.tasks import Advance, Boundary, Collect, Embed, Publish, Settle, Solve

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
VOCABULARY = 512


def save_random_model(folder: Path, shape: str, blocks: int, dtype: torch.dtype) -> None:
    """Weights of random numbers, in the folder's own format; a tokenizer is not needed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=blocks,
        max_position_embeddings=8192,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


class Clock(Observer):
    """One worker does one task after the other; a GPU's work is waited for after each."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[int, list[float]]] = {}
        self._last = 0.0

    def submitted(self, assignment: Assignment, worker: int) -> None:
        self._last = time.perf_counter()

    def finished(self, assignment: Assignment, result: Result) -> None:
        task = assignment.task
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._last
        match task:
            case Embed(chunks) | Boundary(chunks=chunks):
                block, each = 0, seconds / len(chunks)
            case Collect(block, chunks) | Advance(block, chunks):
                each = seconds / len(chunks)
            case Solve(block) | Publish(block) | Settle(block):
                each = seconds
            case _:
                return
        self.seconds.setdefault(type(task).__name__, {}).setdefault(block, []).append(each)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        dtype = getattr(torch, options.dtype)
        save_random_model(folder / "model", options.shape, options.blocks, dtype)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, VOCABULARY, (options.sequences, options.length))
        rows = (json.dumps({"ids": row}) for row in ids.tolist())
        (folder / "ids.jsonl").write_text("\n".join(rows))
        job = {
            "name": "costs",
            "model": {"path": "model"},
            "quantization": {"scheme": "int4", "group_size": 64, "method": "gptq"},
            "compute_dtype": options.dtype,
            "calibration": {
                "jsonl": "ids.jsonl",
                "field": "ids",
                "sequences": options.sequences,
                "length": options.length,
            },
            "workers": {"count": 1, "kind": options.device},
            "output": {"store": "store"},
        }
        give_tokenizer(folder / "model")
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        prepared = check(folder / "job.yaml")
        clock = Clock()
        run_job(prepared, lambda plan: InProcessExecutor(plan, [options.device]), clock)
    contract = prepared.plan.contract
    kinds = {kind: _typical(times) for kind, times in clock.seconds.items()}
    return {
        "shape": options.shape,
        "sequences": options.sequences,
        "length": options.length,
        "chunks": contract.chunks,
        "micro_batch": contract.micro_batch,
        "kind": contract.kind,
        "seconds": kinds,
        "solves_per_block": max(len(t) for t in clock.seconds["Solve"].values()),
    }


def _typical(times: dict[int, list[float]]) -> float:
    """The median over blocks; solves of one block are added up."""
    later = [values for block, values in times.items() if block > 0] or list(times.values())
    return median(sum(values) for values in later)


def give_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    figures = measure(options)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
