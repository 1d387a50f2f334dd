"""HQQ beside plain rounding and beside the hqq package: errors of weights, and perplexity.

    python -m tests.benchmarks.hqq_errors --model FOLDER --peer-python PEER/bin/python
    python -m tests.benchmarks.hqq_errors --model FOLDER --evaluation FILE

The first prints errors of float-zero grids in groups of 64, ours over the peer's, with p 0.7, beta
growing by 1.01 and 20 iterations on both sides, and each side's own beta (ours counts it in steps,
the peer's in the units of the weights): the sum of |error|^0.7, of squares and of magnitudes, over
every linear of the model and over heavy-tailed random weights. The peer runs in an environment of
its own (hqq==0.2.8.post1, torch==2.13.0).

The second prints token perplexity by the protocol of gptq_cpu.py, int4 in groups of 64.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcore.affine import Qparams, choose_qparams, dequantize, quantize
from quantcore.hqq import HqqConfig, hqq_qparams
from quantcore.schemes import Scheme
from tests.benchmarks.gptq_cpu import perplexity

PEER = Path(__file__).with_name("peer_hqq.py")
GROUP = 64
NORMS = (0.7, 2.0, 1.0)

Fit = Callable[[Tensor, Scheme], Qparams]


def plain(w_OI: Tensor, scheme: Scheme) -> Qparams:
    return choose_qparams(w_OI, scheme, stored=w_OI.dtype)


def fitted(w_OI: Tensor, scheme: Scheme) -> Qparams:
    return hqq_qparams(w_OI, scheme, HqqConfig(), stored=w_OI.dtype)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.peer_python:
        for bits, round_zero in ((4, False), (4, True), (8, False)):
            _print_errors(options, bits, round_zero)
    if options.evaluation:
        _print_perplexity(options)


def ratios(w_OI: Tensor, theirs_OI: Tensor, bits: int, fit: Fit = fitted) -> Tensor:
    """Our errors over the peer's, by `NORMS`."""
    scheme = Scheme(name=f"int{bits}", group_size=GROUP, zero_point="float")
    qparams = fit(w_OI, scheme)
    ours_OI = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
    both = (
        torch.stack([(w_OI - o_OI).double().abs().pow(p).sum() for p in NORMS])
        for o_OI in (ours_OI, theirs_OI)
    )
    ours, theirs = both
    return ours / theirs


def peers(
    weights: dict[str, Tensor], python: str, bits: int, round_zero: bool
) -> dict[str, Tensor]:
    """What the peer stores in the place of the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = (f"{scratch}/{name}.safetensors" for name in ("given", "made"))
        save_file(weights, given)
        words = [given, made, str(bits), str(GROUP), str(int(round_zero))]
        subprocess.run([python, str(PEER), *words], check=True, capture_output=True, cwd=scratch)
        return load_file(made)


def heavy_tailed(rows: int = 512, width: int = 1024) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(rows, width, generator=generator)

    squares = sum(normal().square() for _ in range(3))
    return {
        "log-normal spread": 0.02 * normal() * torch.exp(normal()),
        "Student's t, 3 degrees": 0.03 * normal() / (squares / 3).sqrt(),
        "normal, off centre": 0.02 * normal() + 0.05,
    }


def _print_errors(options: argparse.Namespace, bits: int, round_zero: bool) -> None:
    print(f"{bits} bits, the peer's round_zero {round_zero}: |e|^0.7, e^2, |e|, ours / theirs")
    model = _linears(_model(options.model))
    weights = {name: linear.weight.data for name, linear in model.items()}
    for given in (weights, heavy_tailed()):
        theirs = peers(given, options.peer_python, bits, round_zero)
        rows = {name: ratios(w_OI, theirs[name], bits) for name, w_OI in given.items()}
        if given is weights:
            table = torch.stack(list(rows.values()))
            rows = {
                f"{len(table)} linears, mean": table.mean(0),
                "their least": table.amin(0),
                "their largest": table.amax(0),
            }
        for name, row in rows.items():
            print(f"  {name:26}", *(f"{ratio:.4f}" for ratio in row.tolist()), flush=True)


@torch.no_grad()
def _print_perplexity(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.evaluation.read_text()[: 8192 * 6]
    ids = tokenizer(text, verbose=False)["input_ids"]
    print(f"original {perplexity(_model(options.model), ids):.2f}", flush=True)
    for zero_point in ("none", "int", "float"):
        scheme = Scheme(name="int4", group_size=GROUP, zero_point=zero_point)
        for name, fit in {"rtn": plain, "hqq": fitted}.items():
            model = _model(options.model)
            for linear in _linears(model).values():
                w_OI = linear.weight.data
                qparams = fit(w_OI, scheme)
                linear.weight.data = dequantize(quantize(w_OI, qparams, scheme), qparams, scheme)
            print(f"{scheme.label()}, {name}: {perplexity(model, ids):.2f}", flush=True)


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-python", help="for errors beside the peer's")
    parser.add_argument("--evaluation", type=Path, help="for perplexity: the text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
