"""What speed costs: GPTQ in 16 bits, with the kernels, beside the same in plain float32.

    python -m tests.benchmarks.path_objective --model FOLDER --calibration FILE [--device cuda]

Block by block, W4A16 symmetric in groups of 64, on windows of the calibration text as gptq_cpu.py
takes them. The plain path runs transformers' own modules in float32, adds up x x^T by one float32
product, and solves on the CPU in plain torch. The fast path is the one that a job takes on the
device, in bfloat16. Compared is trace((W - Q) H (W - Q)^T), in float64, H from float32 inputs:

    alike   both paths are handed what the plain one made of the blocks before
    apart   each goes its own way through its own quantized blocks, H being that of its own way

Each is told as the fast path's part of the plain one's, layer by layer.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantcore.affine import dequantize, search_qparams
from quantcore.gptq import GptqConfig, factorize, solve
from quantcore.moments import Moments
from quantcore.schemes import Scheme
from tests.benchmarks.gptq_cpu import CHARACTERS, windows
from workers.blocks import BlockModel, Inputs, linears_of, run_block
from workers.fusing import fuse
from workers.kind import hardware_kind, make_repeatable
from workers.sources import open_source

SCHEME = Scheme(name="int4", group_size=64)
BLOCK_COLUMNS = 128
BATCH = 8  # sequences

Weights = dict[str, Tensor]
Squares = dict[str, Tensor]  # H by the linear that reads the input


@dataclass(frozen=True)
class Way:
    """One way to calibrate and solve."""

    model: BlockModel
    fused: bool
    square: Callable[[Tensor, Tensor], None]  # adds x x^T of tokens
    solve_on: torch.device

    def block(self, index: int, weights: Weights | None = None) -> nn.Module:
        block = self.model.block(index, weights)
        if self.fused:
            fuse(block)
        return block

    def squares(self, index: int, batches: list[Inputs]) -> Squares:
        block, prefix = self.block(index), self.model.prefix(index)
        sums: Squares = {}

        def watch(name: str, linear: nn.Linear) -> None:
            width = linear.in_features
            sums[name] = torch.zeros(width, width, device=self.model.device)
            linear.register_forward_pre_hook(
                lambda _, args: self.square(args[0].flatten(0, -2), sums[name])
            )

        for name, linear in linears_of(block):
            watch(prefix + name, linear)
        for batch in batches:
            run_block(block, batch.calls[index], batch.hidden_BLH.to(self.model.dtype))
        tokens = sum(batch.hidden_BLH.shape[:2].numel() for batch in batches)
        lower = {name: sum_II.tril() / tokens for name, sum_II in sums.items()}
        return {name: one + one.tril(-1).t() for name, one in lower.items()}

    def solved(self, weights: Weights, squares: Squares) -> Weights:
        found = {}
        for key, given_OI in weights.items():
            w_OI = given_OI.to(self.solve_on, torch.float32)
            factor = factorize(squares[key].to(self.solve_on), GptqConfig())
            qparams = search_qparams(w_OI, factor.column_costs(), SCHEME, stored=torch.float32)
            codes_OI = solve(w_OI, qparams, SCHEME, factor, BLOCK_COLUMNS)
            found[key] = dequantize(codes_OI, qparams, SCHEME).to(self.model.device)
        return found

    def advanced(self, index: int, batches: list[Inputs], weights: Weights) -> list[Inputs]:
        named = {f"{name}.weight": w_OI for name, w_OI in weights.items()}
        block = self.block(index, named)
        return [
            Inputs(run_block(block, b.calls[index], b.hidden_BLH.to(self.model.dtype)), b.calls)
            for b in batches
        ]


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    make_repeatable(options.threads)
    source = open_source(options.model)
    host = torch.device("cpu")
    plain = Way(BlockModel(source, torch.float32, device), False, _plain_square, host)
    fast_model = BlockModel(source, torch.bfloat16, device)
    fast = Way(fast_model, device.type != "cpu", _fast_square, device)
    rows = list(_rows(options))
    on_plain = [plain.model.embed(ids) for ids in rows]
    on_fast = [fast.model.embed(ids) for ids in rows]
    lines: list[dict[str, Any]] = []
    for index in range(min(options.blocks or len(plain.model), len(plain.model))):
        weights = {
            plain.model.prefix(index) + name: linear.weight.double()
            for name, linear in linears_of(plain.model.block(index))
        }
        squares = plain.squares(index, on_plain)
        found = plain.solved(weights, squares)
        calls = [b.calls for b in on_fast]
        mixed = [Inputs(b.hidden_BLH, c) for b, c in zip(on_plain, calls, strict=True)]
        alike = fast.solved(weights, fast.squares(index, mixed))
        apart = fast.solved(weights, fast.squares(index, on_fast))
        own = [Inputs(b.hidden_BLH, p.calls) for b, p in zip(on_fast, on_plain, strict=True)]
        squares_apart = plain.squares(index, own)
        for name, w_OI in weights.items():
            lost = _objective(w_OI, found[name], squares[name])
            line = {
                "layer": name,
                "plain": lost,
                "alike": _objective(w_OI, alike[name], squares[name]) / lost,
                "apart": _objective(w_OI, apart[name], squares_apart[name]) / lost,
            }
            lines.append(line)
        print(json.dumps(lines[-len(weights) :]), flush=True)
        on_plain = plain.advanced(index, on_plain, found)
        on_fast = fast.advanced(index, on_fast, apart)
    result: dict[str, Any] = {"kind": hardware_kind(options.device), "layers": lines}
    for way in ("alike", "apart"):
        ratios = sorted(line[way] for line in lines)
        whole = sum(line[way] * line["plain"] for line in lines) / sum(n["plain"] for n in lines)
        result[way] = {
            "summed": whole,
            "mean": statistics.fmean(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "beyond half a per cent": sum(abs(ratio - 1) > 0.005 for ratio in ratios),
        }
        print(way, json.dumps(result[way]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _plain_square(x_TI: Tensor, sum_II: Tensor) -> None:
    sum_II.addmm_(x_TI.t(), x_TI)


def _fast_square(x_TI: Tensor, sum_II: Tensor) -> None:
    Moments(sum_II).add(x_TI)


def _objective(w_OI: Tensor, q_OI: Tensor, h_II: Tensor) -> float:
    delta_OI = w_OI - q_OI.double()
    return float(((delta_OI @ h_II.double()) * delta_OI).sum())


def _rows(options: argparse.Namespace) -> Iterator[Tensor]:
    if options.ids:
        rows = json.loads(options.ids.read_text())
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = options.calibration.read_text()[:CHARACTERS]
        ids = tokenizer(text, verbose=False)["input_ids"]
        rows = windows(ids, options.sequences, options.length)
    ids_BL = torch.tensor(rows)
    return (ids_BL[start : start + BATCH] for start in range(0, len(ids_BL), BATCH))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--calibration", type=Path, help="a text")
    given.add_argument("--ids", type=Path, help="JSON: a list of windows of token ids")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="the first ones alone")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
