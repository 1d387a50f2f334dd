"""The figures of linear_gpu.py as a document, written in pieces.

A shape has `records`, a row of the table each, and `runs`: for each run that some of them are of,
its numbers of tokens, its ceilings, and what was missing. All that stands under one shape and
number of tokens is of one run. A document is of one kind of machine and one set of versions.
"""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Shapes = dict[tuple[int, int], dict[str, Any]]


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    told = {"device": name, "cuda": torch.version.cuda or "none"}
    for package in ("torch", "triton", "torchao", "gemlite", "vllm"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "none"
    return told


def known(path: Path | None, here: dict[str, str]) -> Shapes:
    if path is not None and not path.absolute().parent.is_dir():
        raise SystemExit(f"--json: {path} is in no folder that is there: make it first")
    if path is None or not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        shapes = {(shape["rows"], shape["columns"]): shape for shape in document["shapes"]}
        of = document["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--json: {path} is no document of this command's ({error})") from None
    if of != here:
        raise SystemExit(f"--json: {path} is of {of}: write another name")
    return shapes


def joined(
    before: dict[str, Any] | None,
    shape: tuple[int, int],
    run: dict[str, Any],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """Of each number of tokens the newest run's records, all of them."""
    runs, kept = [run], list(records)
    if before is not None:
        kept += [row for row in before["records"] if row["tokens"] not in run["tokens"]]
        for other in before["runs"]:
            if left := [tokens for tokens in other["tokens"] if tokens not in run["tokens"]]:
                runs.append({**other, "tokens": left})
    kept.sort(key=lambda row: row["tokens"])
    return {"rows": shape[0], "columns": shape[1], "runs": runs, "records": kept}


def document(here: dict[str, str], shapes: Shapes) -> dict[str, Any]:
    return {"machine": here, "shapes": list(shapes.values())}


def text(here: dict[str, str], shapes: Shapes) -> str:
    """JSON, a record a line."""
    told = []
    for shape in shapes.values():
        head = json.dumps({name: value for name, value in shape.items() if name != "records"})
        lines = ",\n".join(json.dumps(record) for record in shape["records"])
        told.append(f'{head[:-1]}, "records": [\n{lines}\n]}}')
    body = ",\n".join(told)
    return f'{{"machine": {json.dumps(here)}, "shapes": [\n{body}\n]}}\n'
