"""llm-compressor's GPTQ (W4A16 symmetric, groups of 64) on given token ids, timed.

    PEER/bin/python peer_llmcompressor.py MODEL CALIBRATION.jsonl OUT

Runs in the peer's own environment, which does not have quantfleet. Prints one line of JSON.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, calibration, out = sys.argv[1:4]
    torch.set_num_threads(2)
    lines = Path(calibration).read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    length = len(rows[0])
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length for _ in rows]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=64
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
    seconds = time.perf_counter() - start
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    print(json.dumps({"seconds": seconds, "llmcompressor": version("llmcompressor")}))


if __name__ == "__main__":
    main()
