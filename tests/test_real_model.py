"""A whole real model with a worker killed at every third block.

Run with: QUANTFLEET_MODEL=FOLDER QUANTFLEET_TEXT=FILE pytest -m slow tests/test_real_model.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from tests.faults import PHASES, Kill, KillingExecutor
from workers.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    model, text = os.environ.get("QUANTFLEET_MODEL"), os.environ.get("QUANTFLEET_TEXT")
    if not model or not text:
        pytest.skip("needs QUANTFLEET_MODEL (a folder) and QUANTFLEET_TEXT (a file)")

    def write(name: str, shards: int) -> Path:
        path = tmp_path / f"{name}.yaml"
        calibration = {"text": text, "sequences": 32, "length": 256, "shards": shards}
        path.write_text(
            yaml.safe_dump(
                {
                    "model": {"path": model},
                    "quantization": {"scheme": "int4", "group_size": 64},
                    "calibration": calibration,
                    "workers": {"count": 1, "losses_per_day": 50.0},
                    "output": {"store": "store"},
                }
            )
        )
        return path

    return write


def _model_bytes(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(store) / "model").iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_kill_at_every_third_block_changes_no_bit(job: Callable[..., Path], shards: int) -> None:
    undisturbed = check(job("whole", shards))
    whole = run_job(undisturbed, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    parts = ("gone", "kept", "gone unnoticed")
    kills = [
        Kill(PHASES[1 + number % 4], block, number % 2 == 0, parts[number % 3])
        for number, block in enumerate(range(2, len(undisturbed.plan.blocks), 3))
    ]
    executors: list[KillingExecutor] = []

    def start(plan: Plan) -> KillingExecutor:
        executors.append(KillingExecutor(plan, 2, kills))
        return executors[0]

    killed = run_job(check(job("killed", shards)), start, Observer())
    assert len(executors[0].killed) >= len(kills) - 1  # the last block is not advanced through
    assert _model_bytes(killed.store) == _model_bytes(whole.store)
