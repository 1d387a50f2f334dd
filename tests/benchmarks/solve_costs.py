"""What the parts of a solve cost on one GPU, beside plain torch and the chip's own limits.

    python -m tests.benchmarks.solve_costs [--shape llama-8b llama-70b] [--json OUT]

First the gate: every kernel against float64 or the plain-torch path on the very sizes that are
timed; a miss ends the run. Then one table. Each row is the best of three rounds (by the median) of
a part on random data with correlated inputs; percentiles are of that round's repeats, by events on
the device. `floor` is the product by the vendor's library at the same rate and half the work
(gram), one pass over the weights at copy speed (ranges), or the float32 products that the method
cannot do without, at the rate of a large float32 product (factor, sweep). Peers' figures for the
same layers stand in MEASUREMENTS.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quantkernels import gram as gram_kernels
from quantkernels import ranges as range_kernels
from quantkernels.gram import reference as gram_reference
from torch import Tensor

from quantcore.affine import Qparams, dequantize, search_qparams
from quantcore.gptq import Factor, GptqConfig, factorize, solve
from quantcore.gptq import _inverse_factor as inverse_factor
from quantcore.moments import Moments
from quantcore.schemes import Scheme
from workers.kind import hardware_kind, make_repeatable

TOKENS = 16_384
INT4 = Scheme(name="int4", group_size=128, zero_point="none")
CONFIG = GptqConfig()
# rows of a LinearGroup's stacked linears, and the width of the input they share
SHAPES = {
    "llama-8b": {
        "q k v": (6144, 4096),
        "o": (4096, 4096),
        "gate up": (28_672, 4096),
        "down": (4096, 14_336),
    },
    "llama-70b": {
        "q k v": (10_240, 8192),
        "o": (8192, 8192),
        "gate up": (57_344, 8192),
        "down": (8192, 28_672),
    },
}


@dataclass(frozen=True)
class Row:
    part: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    reference_ms: float | None
    floor_ms: float
    rate: str


def timed(run: Callable[[], object], repeats: int, rounds: int = 3) -> tuple[float, float, float]:
    """p20, p50 and p80 in milliseconds, of the best round."""
    best: list[float] = []
    for number in range(rounds + 1):  # the first one warms up
        times = []
        for _ in range(repeats if number else 2):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        if number and (not best or statistics.median(times) < statistics.median(best)):
            best = sorted(times)
    return best[len(best) // 5], statistics.median(best), best[-1 - len(best) // 5]


def once(run: Callable[[], object]) -> float:
    return timed(run, 1, 1)[1]


def inputs(width: int, count: int = TOKENS) -> Tensor:
    """bfloat16 tokens that move together, of unequal activity."""
    generator = torch.Generator("cuda").manual_seed(width)
    causes_TC = torch.randn(count, 64, device="cuda", generator=generator)
    mixing_CI = torch.randn(64, width, device="cuda", generator=generator) / 8
    x_TI = torch.randn(count, width, device="cuda", generator=generator).add_(causes_TC @ mixing_CI)
    activity_I = torch.rand(width, device="cuda", generator=generator) + 0.2
    return (x_TI * activity_I).bfloat16()


@dataclass(frozen=True)
class Ceilings:
    float32: float  # TFLOP/s of a large product
    copy: float  # TB/s, bytes read and written

    @classmethod
    def measured(cls) -> "Ceilings":
        a = torch.randn(8192, 8192, device="cuda")
        product_ms = timed(lambda: a @ a, 3)[1]
        big = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(big)
        copy_ms = timed(lambda: target.copy_(big), 3)[1]
        return cls(2 * 8192**3 / product_ms / 1e9, 2 * big.numel() / copy_ms / 1e9)


def gram_rows(width: int) -> Iterator[Row]:
    x_TI = inputs(width)
    sum_II = torch.zeros(width, width, device="cuda")
    moments = Moments(sum_II)
    gram_kernels.gram(x_TI, sum_II)
    for first in (0, width - 256):
        exact_RI = x_TI[:, first : first + 256].double().t() @ x_TI.double()
        error_RI = (sum_II[first : first + 256] - exact_RI).tril(first)
        relative = error_RI.norm() / exact_RI.tril(first).norm()
        assert relative < 1e-3, f"gram is off by {relative:.2g}"
        print(f"gate: gram {width}, relative error {relative:.2g}")
    library_ms = timed(lambda: torch.mm(x_TI.t(), x_TI, out_dtype=torch.float32), 5)[1]
    plain_ms = once(lambda: gram_reference.gram(x_TI, sum_II))
    flop = TOKENS * width * (width + 1)
    for name, run in (
        ("gram", lambda: gram_kernels.gram(x_TI, sum_II)),
        ("gram, finite tokens", lambda: moments.add(x_TI)),
    ):
        times = timed(run, 10)
        rate = f"{flop / times[1] / 1e9:.0f} TFLOP/s"
        yield Row(f"{name} {TOKENS} x {width}", *times, plain_ms, library_ms / 2, rate)


def hessian(width: int) -> Tensor:
    moments = Moments(torch.zeros(width, width, device="cuda"))
    for _ in range(-(-2 * width // TOKENS)):
        moments.add(inputs(width))
    return moments.mean()


def factor_row(h_II: Tensor, ceilings: Ceilings) -> Row:
    width = len(h_II)
    factor = factorize(h_II, CONFIG)
    damp = factor.damping * h_II.diagonal().double().mean().item()
    order_I = factor.order_I
    rows = slice(width - 200, width)
    exact_RI = h_II[order_I[rows]][:, order_I].double()
    exact_RI.diagonal(width - 200).add_(damp)
    back_RI = factor.upper_II[rows].double() @ factor.upper_II.double().t()
    relative = (back_RI - exact_RI).norm() / exact_RI.norm()
    assert relative < 1e-5, f"the factor is off by {relative:.2g}"
    print(f"gate: factor {width}, relative error {relative:.2g}")
    times = timed(lambda: factorize(h_II, CONFIG), 3)
    plain_ms = None
    if width <= 14_336:
        plain_ms = once(lambda: inverse_factor(h_II[order_I][:, order_I], damp))
    flop = width**3 / 3
    rate = f"{flop / times[1] / 1e9:.1f} TFLOP/s"
    return Row(f"factor {width}", *times, plain_ms, flop / ceilings.float32 / 1e9, rate)


def range_row(w_OI: Tensor, h_II: Tensor, ceilings: Ceilings) -> tuple[Row, Qparams]:
    importance_I = h_II.diagonal().contiguous()

    def search() -> Qparams:
        return search_qparams(w_OI, importance_I, INT4, stored=torch.bfloat16)

    found = search()
    devices, range_kernels.FUSED_DEVICES = range_kernels.FUSED_DEVICES, ()
    plain, plain_ms = search(), once(search)
    range_kernels.FUSED_DEVICES = devices
    differ = (found.scale_OG != plain.scale_OG).sum().item()
    assert differ <= 1e-4 * plain.scale_OG.numel(), f"{differ} scales differ from plain torch's"
    print(f"gate: ranges {tuple(w_OI.shape)}, {differ} of {plain.scale_OG.numel()} scales differ")
    times = timed(search, 5)
    num_bytes = w_OI.numel() * w_OI.element_size()
    rate = f"{num_bytes / times[1] / 1e6:.0f} GB/s"
    floor_ms = num_bytes / ceilings.copy / 1e9
    return Row(f"ranges {tuple(w_OI.shape)}", *times, plain_ms, floor_ms, rate), found


def solve_row(
    w_OI: Tensor, h_II: Tensor, qparams: Qparams, factor: Factor, ceilings: Ceilings
) -> Row:
    rows, width = w_OI.shape

    def run() -> Tensor:
        return solve(w_OI, qparams, INT4, factor, CONFIG.block_columns)

    part = slice(0, min(rows, 4096))
    codes_OI = run()
    plain_ms = None
    if width <= 14_336:
        damp = factor.damping * h_II.diagonal().double().mean().item()
        upper_II = inverse_factor(h_II[factor.order_I][:, factor.order_I], damp)
        assert upper_II is not None
        plain = Factor(factor.order_I, upper_II, factor.damping, 0)
        plain_OI = solve(w_OI, qparams, INT4, plain, CONFIG.block_columns)
        plain_ms = once(lambda: solve(w_OI, qparams, INT4, plain, CONFIG.block_columns))
        differ = (codes_OI != plain_OI).float().mean().item()
        some = Qparams(qparams.scale_OG[part], qparams.zero_OG[part])
        ours, theirs = (
            objective(w_OI[part], codes[part], some, h_II) for codes in (codes_OI, plain_OI)
        )
        assert abs(ours / theirs - 1) < 0.005, f"the objective is {ours / theirs:.4f} of plain's"
        print(
            f"gate: solve {rows, width}, objective {ours / theirs:.6f} of plain float32's, "
            f"{differ:.2g} of the codes differ"
        )
    times = timed(run, 3)
    flop = rows * width * width
    rate = f"{flop / times[1] / 1e9:.1f} TFLOP/s"
    return Row(f"solve {rows, width}", *times, plain_ms, flop / ceilings.float32 / 1e9, rate)


def objective(w_OI: Tensor, codes_OI: Tensor, qparams: Qparams, h_II: Tensor) -> float:
    delta_OI = w_OI.float() - dequantize(codes_OI, qparams, INT4)
    return float(((delta_OI @ h_II) * delta_OI).sum(dtype=torch.float64).item())


def measured(shape: str, ceilings: Ceilings) -> Iterator[Row]:
    groups = SHAPES[shape]
    for width in sorted({width for _, width in groups.values()}):
        yield from gram_rows(width)
        h_II = hessian(width)
        yield factor_row(h_II, ceilings)
        factor = factorize(h_II, CONFIG)
        for rows in [rows for rows, inner in groups.values() if inner == width]:
            generator = torch.Generator("cuda").manual_seed(rows)
            w_OI = torch.randn(rows, width, device="cuda", generator=generator)
            w_OI = w_OI.mul_(0.02).bfloat16()
            row, qparams = range_row(w_OI, h_II, ceilings)
            yield row
            yield solve_row(w_OI, h_II, qparams, factor, ceilings)
            del w_OI
        del h_II, factor
        torch.cuda.empty_cache()


def whole_block(shape: str, rows: list[Row]) -> float:
    """All of a block's solves in milliseconds: a factor per LinearGroup, ranges and solves."""
    median = {row.part: row.p50_ms for row in rows}
    return sum(
        median[f"factor {width}"] + median[f"ranges {out, width}"] + median[f"solve {out, width}"]
        for out, width in SHAPES[shape].values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-8b"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    make_repeatable(1)
    torch.set_grad_enabled(False)
    kind = hardware_kind("cuda")
    ceilings = Ceilings.measured()
    tables = {}
    for shape in options.shape:
        rows = list(measured(shape, ceilings))
        tables[shape] = [asdict(row) for row in rows]
        print(f"\n{shape}, {kind}\nfloat32 products {ceilings.float32:.1f} TFLOP/s, ", end="")
        print(f"copies {ceilings.copy:.2f} TB/s")
        print(f"{'milliseconds':34}{'p20':>9}{'p50':>9}{'p80':>9}{'plain':>10}{'floor':>9}")
        for row in rows:
            plain = "-" if row.reference_ms is None else f"{row.reference_ms:.2f}"
            times = f"{row.p20_ms:9.3f}{row.p50_ms:9.3f}{row.p80_ms:9.3f}"
            print(f"{row.part:34}{times}{plain:>10}{row.floor_ms:9.3f}  {row.rate}")
        print(
            f"all solves of a block, factors and ranges included: {whole_block(shape, rows):.1f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps({"kind": kind, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
