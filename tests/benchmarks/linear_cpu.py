"""Quantized linears on a CPU beside dense ones: what a token costs, in microseconds.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.linear_cpu [--json OUT]

For every shape, number of tokens and row of ROWS: nn.Linear as quantize_ leaves it, called as a
model calls it, eagerly or (with `--compile`) by torch.compile's code. A call is one of a chain
over copies of the weight that no cache holds together; percentiles are of chains, divided by their
length, in the best of three rounds (by the median), whose rows take turns. GB/s counts the bytes
of the weight as it is stored. `ratio` is to bfloat16's linear of the same mode in the same run.
Both cores must be free: beside other work a call waits for its second thread, up to the scheduler's
8 ms, and such rows are worth nothing.

First the gate: each row against float64, of the weight that it reads back as; a miss ends the run.
Last, what the tensor class itself costs: a linear of 64 by 64 beside the kernel that it calls.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantcore.quantize import quantize_
from quantcore.tensors import Layout, QuantizedTensor
from quantcore.tensors.kernels import kernel_for
from tests.benchmarks import arguments
from workers.kind import hardware_kind

SHAPES = ((4096, 4096), (14_336, 4096), (4096, 14_336), (28_672, 4096))
TOKENS = (1, 2, 4, 16)
ROTATED_BYTES = 400_000_000  # the weights of a chain: no last-level cache has room for them
MOST_OFF = {torch.bfloat16: 8e-3, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    label: str
    dtype: torch.dtype = torch.bfloat16
    scheme: str | None = None  # None: dense
    group_size: int | None = None
    zero_point: Literal["float"] | None = None
    layout: Layout = Layout.PLAIN


ROWS = (
    Row(label="bf16"),
    Row(label="float32", dtype=torch.float32),
    Row(label="int8", scheme="int8"),
    Row(label="int4 g128", scheme="int4", group_size=128, layout=Layout.INT4_CPU),
    Row(label="int4 g64", scheme="int4", group_size=64, layout=Layout.INT4_CPU),
    Row(
        label="int4 g64, float zero",
        scheme="int4",
        group_size=64,
        zero_point="float",
        layout=Layout.INT4_CPU,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    label: str
    rows: int
    columns: int
    tokens: int
    compiled: bool
    p20_us: float
    p50_us: float
    p80_us: float
    weight_bytes: int


class Chain(nn.Module):
    """Copies of one linear, called one after the other on the same inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        copies = max(2, -(-ROTATED_BYTES // weight_bytes(linear)))
        self.links = nn.ModuleList([linear, *(copy.deepcopy(linear) for _ in range(copies - 1))])

    def forward(self, x_TI: Tensor) -> list[Tensor]:
        return [link(x_TI) for link in self.links]


def linear_of(row: Row, rows: int, columns: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(rows + columns)
    linear = nn.Linear(columns, rows, bias=False, dtype=row.dtype)
    linear.weight.data.normal_(std=0.02, generator=generator)
    linear.weight.requires_grad_(False)
    if row.scheme is not None:
        quantize_(
            nn.Sequential(linear),
            row.scheme,
            group_size=row.group_size,
            zero_point=row.zero_point,
            layout=row.layout,
        )
    return linear


def weight_bytes(linear: nn.Linear) -> int:
    weight = linear.weight
    return weight.num_bytes() if isinstance(weight, QuantizedTensor) else weight.nbytes


def gate(row: Row, linear: nn.Linear, run: Callable[[Tensor], Tensor], tokens: int) -> float:
    x_TI = inputs(row, linear.in_features, tokens)
    weight = linear.weight
    w_OI = weight.read_back() if isinstance(weight, QuantizedTensor) else weight
    wanted_TO = torch.cat([x_TI.double() @ part.double().t() for part in w_OI.split(4096)], dim=1)
    off = ((run(x_TI).double() - wanted_TO).norm() / wanted_TO.norm()).item()
    assert off < MOST_OFF[row.dtype], f"{row.label} of {tokens} tokens is off by {off:.2g}"
    return off


def inputs(row: Row, columns: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=generator).to(row.dtype)


def timed(run: Callable[[], object], seconds: float) -> list[float]:
    """The seconds of each call, for as long as told, after one that warms up."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def measured(
    rows: int, columns: int, tokens: tuple[int, ...], compiled: bool, seconds: float
) -> list[Figures]:
    chains = {}
    for row in ROWS:
        linear = linear_of(row, rows, columns)
        chain = Chain(linear)
        run = torch.compile(chain, dynamic=False) if compiled else chain
        chains[row] = (chain, run)
        off = max(gate(row, linear, lambda x, run=run: run(x)[-1], count) for count in tokens)
        print(f"gate: {row.label}, {rows} x {columns}, off by {off:.2g}", flush=True)
    figures = []
    for count in tokens:
        best: dict[Row, list[float]] = {}
        for _ in range(3):
            for row, (chain, run) in chains.items():
                x_TI = inputs(row, columns, count)
                times = [t / len(chain.links) for t in timed(lambda: run(x_TI), seconds)]  # noqa: B023
                if row not in best or statistics.median(times) < statistics.median(best[row]):
                    best[row] = sorted(times)
        for row, times in best.items():
            fifth = len(times) // 5
            figures.append(
                Figures(
                    label=row.label,
                    rows=rows,
                    columns=columns,
                    tokens=count,
                    compiled=compiled,
                    p20_us=times[fifth] * 1e6,
                    p50_us=statistics.median(times) * 1e6,
                    p80_us=times[-1 - fifth] * 1e6,
                    weight_bytes=weight_bytes(chains[row][0].links[0]),
                )
            )
    return figures


def table(figures: list[Figures]) -> str:
    lines = [
        "| rows x columns | tokens | weight | p20 | p50 | p80 | GB/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        base = next(
            other
            for other in figures
            if other.label == "bf16"
            and (other.rows, other.columns, other.tokens) == (f.rows, f.columns, f.tokens)
        )
        what = f"{f.rows} x {f.columns} | {f.tokens} | {f.label}"
        times = f"{f.p20_us:.0f} | {f.p50_us:.0f} | {f.p80_us:.0f}"
        rate, ratio = f.weight_bytes / f.p50_us / 1e3, base.p50_us / f.p50_us
        lines.append(f"| {what} | {times} | {rate:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def overhead_us(row: Row) -> tuple[float, float]:
    """Of a linear whose product costs nothing: all of it, and the kernel's function alone."""
    linear = linear_of(row, 64, 128)
    x_TI = inputs(row, 128, 1)
    if row.scheme is None:
        return statistics.median(timed(lambda: linear(x_TI), 0.3)) * 1e6, 0.0
    weight = linear.weight
    assert isinstance(weight, QuantizedTensor)
    kernel = kernel_for(x_TI, weight)
    whole, inner = (
        statistics.median(timed(run, 0.3)) * 1e6
        for run in (lambda: linear(x_TI), lambda: kernel(x_TI, weight, None))
    )
    return whole, inner


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if columns.isdigit() and int(columns) % 128 == 0 and rows.isdigit() and int(rows) % 16 == 0:
        return arguments.count(rows), arguments.count(columns)
    raise argparse.ArgumentTypeError(f"{text}: write rows by 16 and columns by 128, as 4096x14336")


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--tokens", type=arguments.count, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=arguments.count, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a row, a round")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=arguments.new_file)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    figures = []
    for rows, columns in options.shapes:
        figures += measured(rows, columns, options.tokens, options.compile, options.seconds)
        torch._dynamo.reset()
    kind = hardware_kind("cpu")
    print(f"\n{options.threads} threads, {'compiled' if options.compile else 'eager'}; {kind}\n")
    print(table(figures))
    for row in ROWS:
        whole_us, inner_us = overhead_us(row)
        print(f"64 by 128, {row.label}: {whole_us:.1f} us, of which the kernel's {inner_us:.1f}")
    if options.json:
        rows_of = [asdict(one) for one in figures]
        options.json.write_text(json.dumps({"kind": kind, "rows": rows_of}, indent=1))


if __name__ == "__main__":
    main()
