"""Finds the best launch of the weight-only kernels for this GPU, and writes it down as data.

    python -m quantkernels.tune --out NVIDIA_H200.json
    python -m quantkernels.tune --shapes 28672x4096 --codes int4/128 --tokens 1 16 64 --most 400

For each shape, kind of codes and number of tokens, launches are compiled in as many processes as
there are processors, held to the dense product, and timed: several copies of the weight, more than
the cache holds, one after another in a CUDA graph; the median of some replays. A bfloat16 weight's
product is timed the same way beside. What the file holds of other shapes is kept. Without --out it
is the file that the package ships.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources

from quantkernels.weight_only import fused
from quantkernels.weight_only.arrivals import forget
from quantkernels.weight_only.configs import (
    DENSE,
    KERNEL_VERSION,
    Config,
    Shape,
    Tuned,
    file_name,
    parse,
)
from quantkernels.weight_only.tiles import BITS, Codes, Tiles, grouping, pack_codes, pack_groups

# Llama-3.1-8B's and -70B's, Qwen2.5-7B's: rows by columns, projections that share inputs as one
SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),
]  # fmt: skip
CODES: list[tuple[Codes, int]] = [("int4", 128), ("int4", 64), ("int8", 0), ("float8", 0)]
TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
# rows and warps of a program, for few tokens and for many
FEW = ((32, 1), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4))
MANY = ((128, 4), (128, 8), (256, 8), (256, 16))
CACHE_BYTES = 128 << 20  # more than any cache so far
SHARED_BYTES = 227 << 10  # of a multiprocessor
DTYPE = torch.bfloat16
MOST_ERROR = 1e-2  # relative, of the product beside the dense one's


def main() -> None:
    options = _options()
    out: Path = options.out
    gpu = torch.cuda.get_device_name()
    known = parse(out.read_text()) if out.exists() else []
    found: dict[Shape, Tuned] = {entry.shape: entry for entry in known}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows, columns in options.shapes:
            for codes, group in options.codes:
                for entry in _search(pool, rows, columns, codes, group, options):
                    found[entry.shape] = entry
                    print(_line(entry), flush=True)  # noqa: T201 - a command
                out.write_text(_document(gpu, list(found.values())))


def _search(
    pool: ProcessPoolExecutor,
    rows: int,
    columns: int,
    codes: Codes,
    group: int,
    options: argparse.Namespace,
) -> Iterator[Tuned]:
    dense_bytes = rows * columns * DTYPE.itemsize
    copies = max(2, -(-CACHE_BYTES * 8 // (dense_bytes * BITS[codes])) + 1)
    weights = [_weight(rows, columns, codes, group) for _ in range(copies)]
    denses = [
        fused.dense(weight, DTYPE) for weight in weights[: max(2, CACHE_BYTES // dense_bytes + 1)]
    ]
    for tokens in options.tokens:
        shape = Shape(codes=codes, group=group, rows=rows, columns=columns, tokens=tokens)
        x_TI = torch.randn(tokens, columns, device="cuda", dtype=DTYPE)
        dense_us = timed([partial(linear, x_TI, dense_OI) for dense_OI in denses])
        wanted_TO = linear(x_TI, denses[0])
        launches = list(candidates(shape))
        random.Random(0).shuffle(launches)  # noqa: S311 - some of many, the same each time
        launches = launches[: options.most]
        workers = options.processes
        list(pool.map(_compile, [(shape, launches[n::workers]) for n in range(workers)]))
        best_us, best = float("inf"), DENSE
        for launch in launches:
            try:
                y_TO = _run(launch, x_TI, weights[0])
                if not (y_TO - wanted_TO).norm() < MOST_ERROR * wanted_TO.norm():
                    raise SystemExit(f"wrong: {launch} of {shape}")
                time_us = timed([partial(_run, launch, x_TI, weight) for weight in weights], 5)
            except OutOfResources:  # more than a multiprocessor has
                continue
            if time_us < best_us:
                best_us, best = time_us, launch
        time_us = timed([partial(_run, best, x_TI, weight) for weight in weights])
        times = {"time_us": round(time_us, 2), "dense_us": round(dense_us, 2)}
        yield Tuned(shape=shape, config=best, **times)


def candidates(shape: Shape) -> Iterator[Config]:
    """Launches worth a try: those that fit a multiprocessor and give all of them work."""
    if shape.tokens >= 128:
        yield DENSE
    if shape.tokens > 2048:
        return
    padded = 1 << (shape.tokens - 1).bit_length()
    tokens = 8 if padded <= 8 else min(padded, 128)
    heights = FEW if tokens <= 16 else MANY
    turns, stages, splits = (128, 256), (2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 8, 12, 16)
    for (rows, warps), turn, stage, split in product(heights, turns, stages, splits):
        config = Config(
            rows=rows,
            tokens=tokens,
            split=split,
            turn=turn,
            stages=stage,
            warps=warps,
            early=shape.group > 0 and tokens > 64,
        )
        if _sensible(config, shape):
            yield config


def _sensible(config: Config, shape: Shape) -> bool:
    codes = config.turn * config.rows * BITS[shape.codes] // 8
    loaded = (codes + config.turn * config.tokens * DTYPE.itemsize) * config.stages
    programs = -(-shape.rows // config.rows) * -(-shape.tokens // config.tokens) * config.split
    fills = 180 <= programs <= 900 or (config.split == 1 and programs > 900)
    return loaded <= SHARED_BYTES and config.split <= shape.columns // config.turn and fills


def _compile(work: tuple[Shape, list[Config]]) -> None:
    shape, launches = work
    nothing = torch.empty(4, dtype=torch.int16, device="meta")
    weight = Tiles(
        codes_RPBW=nothing,
        scale=nothing.float(),
        zero=None,
        kind=shape.codes,
        grid="float8" if shape.codes == "float8" else "affine",
        group=shape.group,
        features=(shape.rows, shape.columns),
    )
    x_TI = torch.empty(shape.tokens, shape.columns, dtype=DTYPE, device="meta")
    for launch in launches:
        if not launch.dense:
            fused.linear(x_TI, weight, None, launch, compile_only=True)


def _run(launch: Config, x_TI: Tensor, weight: Tiles) -> Tensor:
    if launch.dense:
        return linear(x_TI, fused.dense(weight, x_TI.dtype))
    return fused.linear(x_TI, weight, None, launch)


def _weight(rows: int, columns: int, codes: Codes, group: int) -> Tiles:
    shape = (rows, columns)
    if codes == "float8":
        codes_OI = torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).view(torch.int8)
    else:
        half = 1 << (BITS[codes] - 1)
        codes_OI = torch.randint(-half, half, shape, device="cuda", dtype=torch.int8)
    scale_OG = torch.rand(rows, columns // group if group else 1, device="cuda") / 64
    return Tiles(
        codes_RPBW=pack_codes(codes_OI, codes),
        scale=pack_groups(scale_OG.to(DTYPE).float(), columns, grouping(group or None, zero=False)),
        zero=None,
        kind=codes,
        grid="float8" if codes == "float8" else "affine",
        group=group,
        features=shape,
    )


def timed(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds of one call, of calls one after another in a graph: the median of replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(calls))
    del graph
    forget()  # a search captures more launches than there are counters for
    return median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _line(entry: Tuned) -> str:
    shape, config = entry.shape, entry.config
    launch = (
        "dense"
        if config.dense
        else f"rows {config.rows} tokens {config.tokens} split {config.split} turn {config.turn} "
        f"stages {config.stages} warps {config.warps}{' early' if config.early else ''}"
    )
    return (
        f"{shape.rows}x{shape.columns} {shape.codes}/{shape.group} {shape.tokens} tokens: "
        f"{entry.time_us:.1f} us, dense {entry.dense_us:.1f}, "
        f"{entry.dense_us / entry.time_us:.2f} times; {launch}"
    )


def _document(gpu: str, entries: list[Tuned]) -> str:
    def key(entry: Tuned) -> tuple[str, int, int, int, int]:
        shape = entry.shape
        return shape.codes, shape.group, shape.rows, shape.columns, shape.tokens

    head = {
        "gpu": gpu,
        "kernel_version": KERNEL_VERSION,
        "made_with": {name: version(name) for name in ("torch", "triton")},
    }
    lines = [json.dumps(entry.document()) for entry in sorted(entries, key=key)]
    return json.dumps(head)[:-1] + ', "weight_only": [\n' + ",\n".join(lines) + "\n]}\n"


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _codes(text: str) -> tuple[Codes, int]:
    codes, _, group = text.partition("/")
    if codes not in BITS:
        raise ValueError(text)
    return codes, int(group or 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    shipped = Path(__file__).parent / "tuned" / file_name(gpu)
    parser.add_argument("--out", type=Path, default=shipped)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES)
    parser.add_argument("--codes", type=_codes, nargs="+", default=CODES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--most", type=int, default=150, help="launches tried of each")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
