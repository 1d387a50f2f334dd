"""The Triton kernels, compiled for a Hopper GPU on any machine: nothing is run.

What the interpreter takes a compiler may not; and a product that spills its registers, or waits for
each instruction of a matrix unit, is slow.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.compiled import CASES, ROUNDINGS

ALL = [*CASES, *ROUNDINGS]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton and its assembler"
)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(ALL)), ids=lambda number: str(ALL[number]))
def test_it_compiles_and_neither_spills_nor_waits(
    number: int, results: list[dict[str, Any]]
) -> None:
    assert "error" not in results[number], results[number]["error"]
    assert results[number]["bytes"] > 0
    assert results[number]["spilled"] == 0
    assert not results[number]["serialized"]
