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

from tests.compiled import ATTENTIONS, CASES, FORWARD, ROUNDINGS, hasty

ALL = [*CASES, *ROUNDINGS, *FORWARD, *ATTENTIONS]

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
    assert results[number]["hasty"] == []
    later = number >= len(CASES) or CASES[number][5].get("LATER", False)
    assert results[number]["dependent"] == later


def test_scales_in_16_bits_are_copied_ahead_as_those_in_32_are(
    results: list[dict[str, Any]],
) -> None:
    """A load of two bytes is waited for where it stands, each turn."""
    of_groups = [n for n, of in enumerate(CASES) if of[0] == "product" and of[2] and of[4]]
    assert len(of_groups) > 5
    for number in of_groups:
        if not CASES[number][5].get("BIAS"):
            assert not results[number]["narrow"], ALL[number]


def test_what_a_dependent_kernel_must_not_do_before_it_waits_is_seen() -> None:
    begin = ".visible .entry k(\n.param .u64 p\n)\n{\nld.param.b64 %rd1, [p];\n"
    released, waits = "griddepcontrol.launch_dependents; // %r1\n", "griddepcontrol.wait; // %r2\n"
    fetched = "prefetch.global.L2 [%rd1];\n"
    load, end = "@%p1 ld.global.b32 { %r4 }, [ %rd1 + 0 ];\n", "ret;\n}\n"
    assert hasty(begin + load + end) == []  # an ordinary one
    assert hasty(begin + fetched + waits + load + released + end) == []
    assert hasty(begin + waits + released + load + end) == []
    assert len(hasty(begin + load + waits + end)) == 1
    for wrong in (load + released, released + waits + load):
        assert "it does not wait" in hasty(begin + wrong + end)[0]
    assert hasty(begin + "@%p1 bra $L1;\n" + waits + end)
