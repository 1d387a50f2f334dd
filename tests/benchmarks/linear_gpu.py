"""Quantized linears on one GPU: ours, bfloat16's and the peers', in one run.

    python -m tests.benchmarks.linear_gpu --json linears.json --svg linears.svg
    python -m tests.benchmarks.linear_gpu --shapes 28672x4096 4096x14336 --tokens 1 16 64

For each shape every kernel is first held to float64: the product of the values that its weight
stands for, with inputs rounded as it rounds them. A row that misses prints WRONG and no time. Then
come the passes, each over all numbers of tokens and kernels in turn, up and down, so that drift
meets them alike; a row is its pass with the lowest median, percentiles and all. A row of many
tokens runs as long before, for the clock to be what its own draw of power leaves. Weights rotate
past the cache, in CUDA graphs. GB/s counts the weight alone. The ratio is bfloat16's median over
the row's: above 1 is faster.

A peer that is not here is named. What --json holds of other shapes and numbers of tokens is kept
(linear_results.py), so that a long run may come in pieces.
--device cpu runs what a CPU can, to try the command.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantkernels.arrivals import forget
from quantkernels.tune import SHAPES
from torch import Tensor

from quantcore.autoquant.ahead import compile_ahead
from quantcore.autoquant.measurements import Product
from tests.benchmarks import arguments
from tests.benchmarks import linear_results as results
from tests.benchmarks.linear_kernels import BF16, OURS, Built, Kernel, named, served, under_compile
from tests.benchmarks.linear_peers import MODE, peers
from tests.benchmarks.linear_picture import draw
from tests.benchmarks.linear_timing import Replay, Times, copies, prepared, timed

TOKENS = [2**power for power in range(14)]
MANY = 256  # tokens, from which on matrix units draw all the power that a GPU may have
MOST_ERROR = 2e-2  # relative: bfloat16 keeps 2e-3 to 4e-3, a scale or a place amiss costs far more
_SPAN = 1024  # tokens that are compared at once
_READ_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
_PRODUCT = {"cuda": 8192, "cpu": 512}


@dataclass(slots=True)
class Row:
    kernel: Kernel
    tokens: int
    num_bytes: int = 0
    error: float | None = None
    failed: str = ""
    replay: Replay | None = None
    passes: list[Times] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error < MOST_ERROR  # NaN is wrong

    def document(self, bf16_us: float | None) -> dict[str, Any]:
        told = {"by": self.kernel.by, "scheme": self.kernel.scheme, "tokens": self.tokens}
        if self.failed:
            return {**told, "failed": self.failed}
        checked = {**told, "num_bytes": self.num_bytes}
        if self.wrong:
            return {**checked, "wrong": f"relative error {self.error:.2g}"}
        best = min(self.passes)
        return {
            **checked,
            "error": self.error,
            "p20_us": round(best.p20_us, 3),
            "p50_us": round(best.p50_us, 3),
            "p80_us": round(best.p80_us, 3),
            "passes_us": [round(times.p50_us, 3) for times in self.passes],
            "gb_s": round(self.num_bytes / best.p50_us / 1e3, 1),
            "ratio": None if bf16_us is None else round(bf16_us / best.p50_us, 3),
        }


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    options = _options(given)
    machine = results.machine(options.device)
    known = results.known(options.json, machine)
    kernels, missing = _kernels(options)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")
    ceilings = _ceilings(options)
    print(f"reading {ceilings['read_tb_s']:.2f} TB/s, ", end="")
    print(f"bf16 products {ceilings['bf16_tflop_s']:.1f} TFLOP/s", flush=True)
    _compile_ahead(kernels, options)
    for shape in options.shapes:
        records = _records(shape, kernels, options)
        _print(shape, records, missing)
        run = {"tokens": options.tokens, "ceilings": ceilings, "missing": missing}
        known[shape] = results.joined(known.get(shape), shape, run, records)
        if options.json:
            options.json.write_text(results.text(machine, known))
        if options.svg:
            options.svg.write_bytes(draw(results.document(machine, known)))


def _compile_ahead(kernels: Sequence[Kernel], options: argparse.Namespace) -> None:
    """All of ours in many processes, which takes seconds for each kernel."""
    if options.device != "cuda":
        return
    compile_ahead(
        Product(
            candidate=kernel.candidate, dtype="bfloat16", rows=rows, columns=columns, tokens=tokens
        )
        for rows, columns in options.shapes
        for kernel in kernels
        if kernel.candidate is not None
        for tokens in options.tokens
    )


def _records(
    shape: tuple[int, int], kernels: Sequence[Kernel], options: argparse.Namespace
) -> list[dict[str, Any]]:
    generator = torch.Generator(options.device).manual_seed(0)
    new = partial(torch.randn, device=options.device, generator=generator)
    w_OI = new(shape).mul_(0.02).bfloat16()
    x_TI = new(max(options.tokens), shape[1]).bfloat16()
    pool = torch.cuda.graph_pool_handle() if options.device == "cuda" else None
    rows = [row for kernel in kernels for row in _checked(kernel, w_OI, x_TI, options, pool)]
    rows.sort(key=lambda row: row.tokens)  # one number of tokens after another; kernels in order
    for number in range(options.passes):
        # up and down: few tokens right after many would meet a GPU slowed down to keep to its power
        for row in rows if number % 2 == 0 else reversed(rows):
            if row.replay is not None:
                row.passes.append(timed(row.replay, settled=row.tokens >= MANY))
    bf16 = [row for row in rows if row.kernel is BF16 and row.passes]
    bf16_us = {row.tokens: min(row.passes).p50_us for row in bf16}
    for row in rows:
        row.replay = None
    forget()  # no graph is left whose counters these were
    return [row.document(bf16_us.get(row.tokens)) for row in rows]


def _checked(
    kernel: Kernel, w_OI: Tensor, x_TI: Tensor, options: argparse.Namespace, pool: Any
) -> list[Row]:
    """The kernel's rows, held to float64 and ready to be timed, or what came of it.

    Whatever others' code raises, the run goes on, and says so.
    """
    rows = [Row(kernel, tokens) for tokens in options.tokens]
    what = f"{tuple(w_OI.shape)} {kernel.label}"
    try:
        built = kernel.build(w_OI)
        count = copies(built.num_bytes, options.device)
        all_alike = [built.multiply, *(copy.deepcopy(built.multiply) for _ in range(count - 1))]
    except Exception as error:
        for row in rows:
            row.failed = _reason(error)
        print(f"failed: {what}: {rows[0].failed}", flush=True)
        return rows
    for row in rows:
        row.num_bytes = built.num_bytes
        x = x_TI[: row.tokens]
        try:
            row.error = _error(kernel, built, x)
            if not row.wrong:
                calls = [partial(multiply, x) for multiply in all_alike]
                row.replay = prepared(calls, options.device, pool)
        except Exception as error:
            row.failed = _reason(error)
            print(f"failed: {what}, {row.tokens} tokens: {row.failed}", flush=True)
    errors = [row.error for row in rows if row.error is not None]
    if errors:
        worst = max(errors, key=lambda error: (math.isnan(error), error))
        print(f"gate: {what}, relative error {worst:.2g} or less", flush=True)
    return rows


def _error(kernel: Kernel, built: Built, x_TI: Tensor) -> float:
    y_TO = built.multiply(x_TI)
    served_TI, w_OI = served(x_TI, kernel.served), built.values_OI.double()
    off = whole = 0.0
    for first in range(0, len(x_TI), _SPAN):
        part = slice(first, first + _SPAN)
        exact_TO = served_TI[part] @ w_OI.t()
        off += float((y_TO[part] - exact_TO).square().sum())
        whole += float(exact_TO.square().sum())
    return (off / whole) ** 0.5


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _ceilings(options: argparse.Namespace) -> dict[str, float]:
    """A sum that only reads, and a large product."""
    device = options.device
    many = torch.ones(_READ_BYTES[device] // 4, device=device)
    size = _PRODUCT[device]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best_us = []
    for call in (many.sum, partial(torch.mm, a, b)):
        call()
        replay = prepared([call], device)
        best_us.append(min(timed(replay) for _ in range(options.passes)).p50_us)
    return {
        "read_tb_s": round(many.numel() * 4 / best_us[0] / 1e6, 3),
        "bf16_tflop_s": round(2 * size**3 / best_us[1] / 1e6, 1),
    }


def _print(
    shape: tuple[int, int], records: Sequence[dict[str, Any]], missing: dict[str, str]
) -> None:
    print(f"\n{shape[0]} x {shape[1]}, microseconds")
    print(f"{'tokens':>6}  {'kernel':36}{'p20':>9}{'p50':>9}{'p80':>9}{'GB/s':>8}{'ratio':>8}")
    for row in records:
        head = f"{row['tokens']:6}  {row['by'] + ' ' + row['scheme']:36}"
        if "failed" in row:
            print(f"{head}  failed")
        elif "wrong" in row:
            print(f"{head}  WRONG: {row['wrong']}")
        else:
            times = "".join(f"{row[name]:9.2f}" for name in ("p20_us", "p50_us", "p80_us"))
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            print(f"{head}{times}{row['gb_s']:8.0f}{ratio:>8}")
    for name in missing:
        print(f"{'':8}{name:36}  missing")
    print(flush=True)


def _kernels(options: argparse.Namespace) -> tuple[list[Kernel], dict[str, str]]:
    others, missing = peers(options.device, options.gemlite_search)
    ours = [kernel for kernel in OURS if options.device in kernel.devices]
    if options.compile_ours:
        ours += [under_compile(kernel, MODE) for kernel in ours]
    return [BF16, *named(options.kernels, [*ours, *others])], missing


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=arguments.shape, nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS"
    )
    parser.add_argument("--tokens", type=arguments.count, nargs="+", default=TOKENS)
    parser.add_argument("--kernels", nargs="+", help="parts of names; bf16 always runs")
    parser.add_argument("--passes", type=arguments.count, default=3)
    parser.add_argument("--device", type=arguments.device, default="cuda")
    parser.add_argument("--gemlite-search", choices=("fast", "max"), default="fast")
    parser.add_argument("--compile-ours", action="store_true", help="ours by torch.compile as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=arguments.new_file)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
