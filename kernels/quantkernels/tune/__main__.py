"""Finds the best launch of our products' kernels for this GPU, and writes it down as data.

    python -m quantkernels.tune --out NVIDIA_H200.json
    python -m quantkernels.tune --shapes 28672x4096 --of weight_only/int4/128 --tokens 1 16 64

For each shape, kind of codes and number of tokens, launches are compiled in as many processes as
there are processors, held to the dense product, and timed: several copies of the weight, more than
the cache holds, one after another in a CUDA graph; the median of some replays. A bfloat16 weight's
product is timed the same way beside. What the file holds of other shapes is kept, and it is whole
whenever the search is interrupted. Without --out it is the file that the package ships. A folder of
such files is read where QUANTFLEET_TUNED names it. With --familiar only those launches are tried
that are in the file as the best of other shapes: a second or two for each combination, not five.
With --missing only what the file has no launch of is searched for.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from quantkernels.launches import (
    VERSIONS,
    Codes,
    Kernel,
    Shape,
    Tuned,
    file_name,
    parse,
)
from quantkernels.tune import SHAPES
from quantkernels.tune.arguments import count, shape
from quantkernels.tune.search import Of, compiling, search

ALL: list[Of] = [
    ("weight_only", "int4", 128),
    ("weight_only", "int4", 64),
    ("weight_only", "int4", 32),
    ("weight_only", "int8", 0),
    ("weight_only", "float8", 0),
    ("w8a8", "int8", 0),
    ("w8a8", "float8", 0),
]
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def main(arguments: Sequence[str] | None = None) -> None:
    options, known = _options(arguments)
    out: Path = options.out
    gpu = torch.cuda.get_device_name()
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
                if not (options.missing and shape in found)
            }
            for rows, columns in options.shapes
            for of in options.of
        ]
        try:
            for work in filter(None, works):
                for entry in search(work):
                    found[entry.shape] = entry
                    print(_line(entry), flush=True)  # noqa: T201 - a command
                _write(out, _document(gpu, list(found.values())))
        finally:  # what was interrupted compiles no more
            pool.shutdown(wait=False, cancel_futures=True)


def _write(out: Path, text: str) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


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
        f"{entry.ratio:.2f} times; {how}"
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


def _of(text: str) -> Of:
    parts = text.split("/")
    kernel, codes, group = [*parts, "0"][:3] if 2 <= len(parts) <= 3 else ("", "", "")
    known = dict.fromkeys(f"{name}/{kind}" for name, kind, _ in ALL)
    of_group = group == "0" or (kernel == "weight_only" and group in ("32", "64", "128"))
    if f"{kernel}/{codes}" not in known or not of_group:
        raise argparse.ArgumentTypeError(
            f"{text}: write one of {', '.join(known)}, or weight_only/CODES/GROUP of 32, 64 or 128 "
            "columns"
        )
    return cast(Kernel, kernel), cast(Codes, codes), int(group)


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Tuned]]:
    """What is asked for, and what is known already; what may be refused is before the search."""
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    shipped = Path(__file__).parents[1] / "tuned" / file_name(gpu or "GPU")
    parser.add_argument("--out", type=Path, default=shipped)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--of", type=_of, nargs="+", default=ALL, help="weight_only/int4/128 ...")
    parser.add_argument("--tokens", type=count, nargs="+", default=TOKENS)
    parser.add_argument("--most", type=count, default=150, help="launches tried of each")
    parser.add_argument(
        "--familiar", action="store_true", help="only launches that are best of another shape"
    )
    parser.add_argument("--missing", action="store_true", help="only what is not in the file")
    parser.add_argument("--processes", type=count, default=multiprocessing.cpu_count())
    options = parser.parse_args(arguments)
    out: Path = options.out
    for (_, columns), (kernel, codes, group) in product(options.shapes, options.of):
        if group and columns % group:
            what = f"{kernel}/{codes}/{group}"
            parser.error(f"--of {what}: {columns} columns are no groups of {group}")
    if not gpu:
        parser.error("there is no CUDA GPU here: run it on the one that launches are searched for")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        parser.error(f"--out {out}: write a file in a folder that can be written to")
    try:
        return options, parse(out.read_text(), gpu, str(out)) if out.exists() else []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        parser.error(f"--out {out} holds no launches of this GPU ({error}): write another name")


if __name__ == "__main__":
    main()
