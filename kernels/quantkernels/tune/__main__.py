"""Finds the best launch of our products' kernels for this GPU, and writes it down as data.

    python -m quantkernels.tune --out NVIDIA_H200.json
    python -m quantkernels.tune --shapes 28672x4096 --of weight_only/int4/128 --tokens 1 16 64

For each shape, kind of codes and number of tokens, launches are compiled in as many processes as
there are processors, held to the dense product, and timed: several copies of the weight, more than
the cache holds, one after another in a CUDA graph; the median of some replays. A bfloat16 weight's
product is timed the same way beside. What the file holds of other shapes is kept. Without --out it
is the file that the package ships. With --familiar only those are tried that are in the file as the
best of other shapes, which takes a second or two for each combination in place of five.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch

from quantkernels.launches import (
    VERSIONS,
    Codes,
    Shape,
    Tuned,
    file_name,
    parse,
)
from quantkernels.tune import SHAPES
from quantkernels.tune.search import Of, compiling, search

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


def main() -> None:
    options = _options()
    out: Path = options.out
    gpu = torch.cuda.get_device_name()
    known = parse(out.read_text()) if out.exists() else []
    found: dict[Shape, Tuned] = {entry.shape: entry for entry in known}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        works = [
            {
                shape: compiling(
                    pool,
                    shape,
                    options.most,
                    options.processes,
                    known if options.familiar else None,
                )
                for shape in _shapes(rows, columns, of, options.tokens)
            }
            for rows, columns in options.shapes
            for of in options.of
        ]
        for work in works:
            for entry in search(work):
                found[entry.shape] = entry
                print(_line(entry), flush=True)  # noqa: T201 - a command
            out.write_text(_document(gpu, list(found.values())))


def _shapes(rows: int, columns: int, of: Of, tokens: Iterable[int]) -> list[Shape]:
    kernel, codes, group = of
    one = Shape(kernel=kernel, codes=codes, group=group, rows=rows, columns=columns, tokens=1)
    return [replace(one, tokens=count) for count in tokens]


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
    parser.add_argument(
        "--familiar", action="store_true", help="only launches that are best of another shape"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
