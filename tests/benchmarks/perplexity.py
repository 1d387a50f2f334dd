"""Token perplexity of a causal model on given ids: windows of 1,024, no token of a beginning.

    python -m tests.benchmarks.perplexity TEXT FOLDER [FOLDER ...]

prints that of models and artifacts on a text's first 8,192 tokens, in float32.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from workers.loading import load

WINDOW = 1024


@torch.no_grad()
def token_losses(model: Any, ids: list[int], count: int = 8192, width: int = WINDOW) -> Tensor:
    """-log p of every token but each window's first, in nats: float64 (windows, width - 1)."""
    losses = []
    for start in range(0, count - width + 1, width):
        window = torch.tensor(ids[start : start + width], device=model.device)[None]
        logits = model(window).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        losses.append(loss.double().cpu())
    return torch.stack(losses)


def perplexity(model: Any, ids: list[int], count: int = 8192, width: int = WINDOW) -> float:
    return math.exp(token_losses(model, ids, count, width).mean().item())


def main(text: str, *folders: str) -> None:
    for folder in map(Path, folders):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(Path(text).read_text()[: 8192 * 6], verbose=False)["input_ids"]
        print(folder.name, f"{perplexity(load(folder, torch.float32), ids):.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
