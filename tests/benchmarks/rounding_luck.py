"""How far a model's perplexity moves by the luck of one rounding.

    python -m tests.benchmarks.rounding_luck --model FOLDER --evaluation FILE --error 0.0085 0.026

Every linear's weights are given random errors, independent and uniform, of a size |E| / |W| as a
scheme's rounding has it, several times over. The spread of the perplexities is what no order of
schemes can be told apart by, however long the text: each scheme is one such draw.
"""

import argparse
import copy
import math
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.perplexity import token_losses


@torch.no_grad()
def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.evaluation.read_text()[: 8192 * 6], verbose=False)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    base = token_losses(plain, ids).mean().item()
    print(f"without errors: {math.exp(base):.3f}", flush=True)
    for error in options.error:
        losses = []
        for seed in range(options.draws):
            torch.manual_seed(seed)
            model = copy.deepcopy(plain)
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    w_OI = module.weight
                    noise_OI = torch.rand_like(w_OI) - 0.5
                    w_OI += noise_OI * (error * w_OI.norm() / noise_OI.norm())
            losses.append(token_losses(model, ids).mean().item())
        added = [loss - base for loss in losses]
        print(
            f"|E| / |W| = {error}: {mean(added):+.4f} nats, deviation {stdev(added):.4f}, "
            f"perplexities {' '.join(f'{math.exp(loss):.2f}' for loss in losses)}",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--error", type=float, nargs="+", default=[0.0085, 0.026, 0.1])
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
