"""Our side of the exchange with llm-compressor: what to send it, and how to start it."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcore.schemes import FloatGrid, Scheme

PYTHON = "QUANTFLEET_LLMC_PYTHON"
_SCRIPT = Path(__file__).with_name("llmcompressor_linears.py")


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    scheme: Scheme
    w_OI: Tensor
    h_II: Tensor | None = None  # for GPTQ


def run_linears(python: str, cases: Sequence[Case], scratch: Path) -> dict[str, Tensor]:
    """NAME.scale, NAME.zero, NAME.codes and NAME.gptq, as llm-compressor finds them."""
    tensors = {f"{case.name}.w": case.w_OI for case in cases}
    tensors |= {f"{case.name}.h": case.h_II for case in cases if case.h_II is not None}
    listed = [
        {"name": case.name, "args": _arguments(case.scheme), "hessian": case.h_II is not None}
        for case in cases
    ]
    source, target = scratch / "cases.safetensors", scratch / "found.safetensors"
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        source,
        metadata={"cases": json.dumps(listed)},
    )
    _run(python, "linears", source, target)
    return load_file(target)


def run_smooth(python: str, model: Path, calibration: Path, alpha: float, out: Path) -> None:
    _run(python, "smooth", model, calibration, str(alpha), out)


def _arguments(scheme: Scheme) -> Mapping[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "float" if isinstance(scheme.grid, FloatGrid) else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.span,
        "group_size": scheme.group_size,
    }


def _run(python: str, *arguments: str | Path) -> None:
    run = subprocess.run(
        [python, str(_SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(arguments[-1]).parent,  # it writes logs where it stands
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        raise AssertionError(f"llm-compressor failed:\n{run.stderr[-6000:]}")
