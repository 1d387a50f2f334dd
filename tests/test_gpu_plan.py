"""quantfleet plan on a GPU: our kernels race there, in a worker, and a job follows the plan."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcore.autoquant.document import parse
from tests.command import quantfleet
from workers.measured import open_measurements, read

pytestmark = pytest.mark.gpu


def test_a_gpu_is_planned_from_yaml_and_followed(
    job_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = {
        "candidates": ["default", "int4"],
        "calls": [{"tokens": 1}, {"tokens": 64}],
        "budgets": {"bytes": "150KiB"},
        "rounding": "rtn",
    }
    quantization = {"method": "plan", "plan": planned}
    workers = {"count": 1, "kind": "cuda"}
    job = job_file(quantization=quantization, compute_dtype="bfloat16", workers=workers)
    outcome = quantfleet("plan", job, "--in-process", "--json")
    assert outcome.code == 0, outcome
    (facts,) = json.loads(outcome.out)["plans"]
    plan = parse(Path(facts["store"]).read_text())
    assert plan.hardware.device == "cuda"
    assert plan.hardware.driver
    timed = read(open_measurements(str(tmp_path / "store"))).of[plan.hardware]
    assert "triton_tiled" in {product.candidate.layout for product in timed}
    assert {"dense", "chosen by prediction"} <= {end.plan for end in plan.ends}
    assert sum(end.kept for end in plan.ends) == 1
    assert quantfleet("run", job, "--in-process").code == 0
    again = quantfleet("plan", "show", facts["store"], "--json")
    assert json.loads(again.out)["totals"]["num_bytes"] <= 150 << 10
