"""GPTQModel, and transformers through it, read gptq artifacts to the bit.

    QUANTFLEET_GPTQMODEL_PYTHON=/path/to/its/python pytest -m gptqmodel

Its environment has optimum as well.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from orchestrator.fetch import fetch
from quantcore.tensors import QuantizedTensor
from tests.test_orchestrator_job import run_here
from workers.loading import load
from workers.store import open_store

pytestmark = pytest.mark.gptqmodel

PYTHON = "QUANTFLEET_GPTQMODEL_PYTHON"
GROUPS = {"scheme": "int4", "group_size": 32, "method": "rtn"}
CHANNEL = {"scheme": "int8", "method": "rtn"}
SKIPS = {
    **GROUPS,
    "overrides": [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.mlp.down_proj", "skip": True},
    ],
}
MIXED = {
    **GROUPS,
    "overrides": [
        {"match": "*.layers.0.mlp.*", "scheme": "int8", "group_size": "channel"},
        {"match": "*.layers.1.self_attn.[qkv]_proj", "group_size": 16},
        {"match": "*.layers.2.mlp.down_proj", "skip": True},
    ],
}


def asymmetric(quantization: dict[str, Any]) -> dict[str, Any]:
    return {**quantization, "symmetric": False}


CASES = [
    pytest.param("gptq", GROUPS, id="v1-int4-groups"),
    pytest.param("gptq", CHANNEL, id="v1-int8-channel"),
    pytest.param("gptq", SKIPS, id="v1-skips"),
    pytest.param("gptq_v2", GROUPS, id="v2-int4-groups"),
    pytest.param("gptq_v2", asymmetric(GROUPS), id="v2-int4-asymmetric"),
    pytest.param("gptq_v2", asymmetric(CHANNEL), id="v2-int8-asymmetric"),
]


@pytest.fixture(scope="module")
def gptqmodel_python() -> str:
    python = os.environ.get(PYTHON)
    if not python:
        pytest.fail(f"set {PYTHON} to the Python of an environment with GPTQModel and optimum")
    return python


def read_by(
    how: str,
    python: str,
    form: str,
    quantization: dict[str, Any],
    job_file: Callable[..., Path],
    folder: Path,
) -> None:
    """Make an artifact, have it read, and hold what was read against our own reading."""
    output = {"store": str(folder / "store"), "format": form}
    result = run_here(job_file(quantization=quantization, calibration=None, output=output))
    out, told = folder / "out", folder / "read.safetensors"
    fetch(open_store(result.store), out)
    script = Path(__file__).with_name("read_gptq.py")
    run = subprocess.run(
        [python, str(script), how, str(out), str(told)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    theirs = load_file(told)
    ours = load(out, torch.float32)
    linears = {n: m for n, m in ours.named_modules() if isinstance(m, nn.Linear)}
    packed = {n: m.weight for n, m in linears.items() if isinstance(m.weight, QuantizedTensor)}
    logits = theirs.pop("logits")
    assert theirs.keys() == packed.keys()
    for name, weight in packed.items():
        w_OI = weight.dequantize()
        assert torch.equal(theirs[name], w_OI.half()), name  # its products are float16's
    with torch.no_grad():
        expected = ours(torch.arange(2, 34)[None]).logits
    assert (logits.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("form", "quantization"), CASES)
@pytest.mark.parametrize("how", ["gptqmodel", "transformers"])
def test_it_reads_the_weights_that_were_written(
    how: str,
    form: str,
    quantization: dict[str, Any],
    gptqmodel_python: str,
    job_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    read_by(how, gptqmodel_python, form, quantization, job_file, tmp_path)


def test_gptqmodel_reads_several_schemes_in_one_model(
    gptqmodel_python: str, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    read_by("gptqmodel", gptqmodel_python, "gptq", MIXED, job_file, tmp_path)
