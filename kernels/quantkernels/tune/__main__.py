"""Finds the best launch of our products' kernels for this GPU, and writes it down as data.

    python -m quantkernels.tune --out NVIDIA_H200.json
    python -m quantkernels.tune --shapes 28672x4096 --of weight_only/int4/128 --tokens 1 16 64

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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from io import StringIO
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

import torch
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources, PTXASError

from quantkernels.launches import (
    OTHER,
    VERSIONS,
    Codes,
    Kernel,
    Launch,
    Shape,
    Tuned,
    file_name,
    parse,
)
from quantkernels.tune import SHAPES
from quantkernels.tune.subjects import SUBJECTS, candidates
from quantkernels.tune.timing import timed

Of = tuple[Kernel, Codes, int]  # and the size of a group, 0 for whole rows
ALL: list[Of] = [
    ("weight_only", "int4", 128),
    ("weight_only", "int4", 64),
    ("weight_only", "int8", 0),
    ("weight_only", "float8", 0),
    ("w8a8", "int8", 0),
    ("w8a8", "float8", 0),
    ("w8a8", "int4", 32),
]
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
CACHE_BYTES = 128 << 20  # more than any cache so far
# relative, of a product beside that of the values rounded to bfloat16
MOST_ERROR = {"weight_only": 1e-2, "w8a8": 2e-2}


def main() -> None:
    options = _options()
    out: Path = options.out
    gpu = torch.cuda.get_device_name()
    known = parse(out.read_text()) if out.exists() else []
    found: dict[Shape, Tuned] = {entry.shape: entry for entry in known}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows, columns in options.shapes:
            for of in options.of:
                for entry in _search(pool, rows, columns, of, options):
                    found[entry.shape] = entry
                    print(_line(entry), flush=True)  # noqa: T201 - a command
                out.write_text(_document(gpu, list(found.values())))


def _search(
    pool: ProcessPoolExecutor, rows: int, columns: int, of: Of, options: argparse.Namespace
) -> Iterator[Tuned]:
    kernel, codes, group = of
    subject = SUBJECTS[kernel]
    units = torch.cuda.get_device_properties().multi_processor_count
    shapes = [
        Shape(kernel=kernel, codes=codes, group=group, rows=rows, columns=columns, tokens=tokens)
        for tokens in options.tokens
    ]
    weights: list[Any] = [subject.weight(shapes[0], "cuda")]
    while len(weights) < 2 or len(weights) * subject.bytes(weights[0]) < CACHE_BYTES:
        weights.append(subject.weight(shapes[0], "cuda"))
    dense_OI = subject.dense(weights[0])
    denses = [dense_OI.clone() for _ in range(max(2, CACHE_BYTES // (2 * rows * columns) + 1))]
    for shape in shapes:
        inputs = subject.inputs(shape, "cuda")
        x_TI = subject.served(inputs)
        dense_us = median(timed([partial(linear, x_TI, dense) for dense in denses]))
        wanted_TO = linear(x_TI, dense_OI)
        launches = list(candidates(shape, units))
        random.Random(0).shuffle(launches)  # noqa: S311 - some of many, the same each time
        launches = launches[: options.most]
        workers = options.processes
        work = [(shape, launches[n::workers]) for n in range(workers)]
        best_us, best = float("inf"), OTHER
        for launch in chain.from_iterable(pool.map(_compile, work)):
            try:
                y_TO = subject.run(launch, inputs, weights[0])
                if not (y_TO - wanted_TO).norm() < MOST_ERROR[kernel] * wanted_TO.norm():
                    raise SystemExit(f"wrong: {launch} of {shape}")
                calls = [partial(subject.run, launch, inputs, weight) for weight in weights]
                time_us = median(timed(calls, 5))
            except OutOfResources:  # more than a multiprocessor has
                continue
            if time_us < best_us:
                best_us, best = time_us, launch
        calls = [partial(subject.run, best, inputs, weight) for weight in weights]
        yield Tuned(
            shape=shape,
            launch=best,
            time_us=round(median(timed(calls)), 2),
            dense_us=round(dense_us, 2),
        )


def _compile(work: tuple[Shape, list[Launch]]) -> list[Launch]:
    """Those that can be compiled: of some the assembler finds that registers do not suffice."""
    shape, launches = work
    good: list[Launch] = []
    subject = SUBJECTS[shape.kernel]
    inputs, weight = subject.inputs(shape, "meta"), subject.weight(shape, "meta")
    for launch in launches:
        with suppress(OutOfResources, PTXASError), redirect_stdout(StringIO()):
            if not launch.other:
                subject.compile(launch, inputs, weight)
            good.append(launch)
    return good


def _line(entry: Tuned) -> str:
    shape, launch = entry.shape, entry.launch
    how = "not by our kernel"
    if not launch.other:
        told = {name: value for name, value in asdict(launch).items() if value}
        how = " ".join(f"{name} {value}" for name, value in told.items())
    return (
        f"{shape.rows}x{shape.columns} {shape.kernel} {shape.codes}/{shape.group} {shape.tokens} "
        f"tokens: {entry.time_us:.1f} us, dense {entry.dense_us:.1f}, "
        f"{entry.dense_us / entry.time_us:.2f} times; {how}"
    )


def _document(gpu: str, entries: list[Tuned]) -> str:
    def key(entry: Tuned) -> tuple[Any, ...]:
        shape = entry.shape
        of = (shape.kernel, shape.codes, shape.group)
        return *of, shape.rows, shape.columns, shape.tokens

    head = {
        "gpu": gpu,
        "versions": VERSIONS,
        "made_with": {name: version(name) for name in ("torch", "triton")},
    }
    lines = [json.dumps(entry.document()) for entry in sorted(entries, key=key)]
    return json.dumps(head)[:-1] + ', "launches": [\n' + ",\n".join(lines) + "\n]}\n"


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _of(text: str) -> Of:
    kernel, codes, group = [*text.split("/"), "0"][:3]
    if kernel not in VERSIONS or codes not in get_args(Codes):
        raise argparse.ArgumentTypeError(f"{text}: write KERNEL/CODES or KERNEL/CODES/GROUP")
    return kernel, cast(Codes, codes), int(group)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    shipped = Path(__file__).parents[1] / "tuned" / file_name(gpu)
    parser.add_argument("--out", type=Path, default=shipped)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES)
    parser.add_argument("--of", type=_of, nargs="+", default=ALL, help="weight_only/int4/128 ...")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--most", type=int, default=150, help="launches tried of each")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
