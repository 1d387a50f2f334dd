"""Our kernels compiled before they are timed: in several processes, each launch once.

    python -m quantcore.autoquant.ahead < PRODUCTS     # what each of these processes is

Candidates of four shapes and three numbers of tokens are some 160 kernels, each of which Triton
takes seconds for, in one thread. So the launches that data choose (quantkernels/choice.py) are
compiled for weights without memory, and lie in Triton's cache on disk when they are run. What fails
here fails again there, and says why.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from quantkernels.choice import Gpu, gpu_of
from torch import Tensor

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.measurements import Product
from quantcore.autoquant.shapes import weight_of
from quantcore.tensors import Layout, QuantizedTensor, w8a8, weight_only
from quantcore.tensors.kernels import KERNELS

_MOST_PROCESSES = 16
_FEWEST = 8  # kernels that are worth the start of a process that imports torch


def compile_ahead(products: Iterable[Product]) -> int:
    """How many kernels there were to compile, for the GPU at hand."""
    gpu = gpu_of(torch.device("cuda"))
    wanted: dict[object, Product] = {}
    for product in products:
        if (key := _kernel_of(product, gpu)) is not None:
            wanted.setdefault(key, product)
    count = min(_MOST_PROCESSES, os.cpu_count() or 1, len(wanted) // _FEWEST)
    if count > 1:
        _run([list(wanted.values())[start::count] for start in range(count)], gpu)
    return len(wanted)


def _run(shares: Sequence[Sequence[Product]], gpu: Gpu) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "quantcore.autoquant.ahead"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )
        for _ in shares
    ]
    try:
        for process, share in zip(processes, shares, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as lines:
                lines.writelines(f"{_line(product, gpu)}\n" for product in share)
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()


def _line(product: Product, gpu: Gpu) -> str:
    facts = {name: getattr(product, name) for name in ("dtype", "rows", "columns", "tokens")}
    return json.dumps({"candidate": product.candidate.label(), **facts, "gpu": list(gpu)})


def _kernel_of(product: Product, gpu: Gpu) -> object | None:
    """Alike for products of one kernel; None where it is none of ours."""
    weight, x_TI = _weight(product), _inputs(product)
    if weight is None:
        return None
    kernels = _kernels_for(weight)
    launch = kernels.launch_of(x_TI, weight, gpu)
    if launch.other:
        return None
    form = kernels.__name__, *kernels.form_of(weight)
    return form, product.dtype, launch, product.columns, min(product.tokens, 2)


def _weight(product: Product) -> QuantizedTensor | None:
    """Where one of our kernels multiplies by it."""
    candidate = product.candidate
    if candidate.scheme is None:
        return None
    rows = KERNELS.get(("cuda", candidate.layout, candidate.scheme.name), ())
    if not any(row.run in (weight_only.multiply, w8a8.multiply) for row in rows):
        return None
    weight = weight_of(candidate, product.rows, product.columns, product.dtype)
    assert isinstance(weight, QuantizedTensor)
    return weight


def _kernels_for(weight: QuantizedTensor) -> ModuleType:
    return weight_only if weight.layout_name == Layout.TRITON_TILED else w8a8


def _inputs(product: Product) -> Tensor:
    kind = getattr(torch, product.dtype)
    return torch.empty(product.tokens, product.columns, dtype=kind, device="meta")


def compile_one(line: str) -> None:
    facts: dict[str, Any] = json.loads(line)
    name, units = facts.pop("gpu")
    product = Product(candidate=candidate_of(facts.pop("candidate")), **facts)
    weight, x_TI = _weight(product), _inputs(product)
    assert weight is not None
    _kernels_for(weight).compile_for(x_TI, weight, (name, units))


def main(lines: Iterable[str]) -> None:
    for line in lines:
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            compile_one(line)


if __name__ == "__main__":
    main(sys.stdin)
