"""llm-compressor's GPTQ (W4A16 symmetric) on given token ids, timed.

    PEER/bin/python peer_llmcompressor.py MODEL CALIBRATION.jsonl OUT [--device cuda ...]

Runs in the peer's own environment, which does not have quantfleet. Prints one line of JSON, last.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    lines = Path(options.calibration).read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.warm_up:
        quantized(options, rows[: options.warm_up], tokenizer)
    model, seconds, peak = quantized(options, rows, tokenizer)
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    told = {"seconds": seconds, "peak_bytes": peak, "llmcompressor": version("llmcompressor")}
    print(json.dumps(told))


def quantized(
    options: argparse.Namespace, rows: list[list[int]], tokenizer: Any
) -> tuple[Any, float, int]:
    """A model, the seconds that its quantization took, and a GPU's peak of bytes."""
    length = len(rows[0])
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length for _ in rows]})
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model = model.to(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=options.group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    start = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=GPTQModifier(config_groups={"g": scheme}, ignore=["lm_head"]),
        max_seq_length=length,
        num_calibration_samples=len(rows),
    )
    peak = 0
    if options.device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return model, time.perf_counter() - start, peak


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=0, help="sequences to try it with first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
