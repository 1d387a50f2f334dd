"""The command line as tests call it: inside this process, or as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

_TIMEOUT_S = 300  # far beyond what any command here takes: it ends a hang, it measures nothing


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


def quantfleet(*args: str | Path) -> Outcome:
    """Run a command in this process: a tenth of a second instead of several."""
    from typer.testing import CliRunner

    from orchestrator.cli import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def start(*args: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start a command as users do, with more environment variables."""
    command = [sys.executable, "-m", "orchestrator", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    try:
        out, err = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, out, err)


def quantfleet_process(*args: str | Path, **variables: str) -> Outcome:
    return finish(start(*args, **variables))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; fails if the process ends first, or after the time-out."""
    end = time.monotonic() + _TIMEOUT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"nothing to see before the end: {process.communicate()}")
        time.sleep(0.02)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}
