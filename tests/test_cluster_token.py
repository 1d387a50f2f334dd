"""A real Ray on the loopback that wants a token: who is let in, and what the others are told."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ray_cluster import is_loopback
from tests.command import quantfleet_process

pytestmark = pytest.mark.timeout(600)

NODES = Path(__file__).parents[1] / "deploy" / "two_nodes.py"
WHAT_TO_SET = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Its addresses, and `token`: the path of its token. No other token is in reach."""
    folder = tmp_path_factory.mktemp("token")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    nodes = [sys.executable, str(NODES)]
    where = ["--folder", str(folder / "nodes")]
    env = os.environ | {"RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder)}
    done = subprocess.run(
        [*nodes, "start", "--nodes", "1", "--json", *where],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    try:
        yield {**json.loads(done.stdout), "token": str(token), "home": str(folder)}
    finally:
        subprocess.run([*nodes, "stop", *where], env=env, timeout=100, check=True)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any]) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", cluster["home"])


@pytest.mark.parametrize(
    ("command", "variables", "told"),
    [
        (["list"], {}, "wants a token"),
        (["list"], {"RAY_AUTH_MODE": "token"}, "wants a token"),
        (["list"], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, "takes another token"),
        (["submit", "JOB"], {}, "wants a token"),
        pytest.param(["status", "a-job"], {}, "wants a token", marks=pytest.mark.slow),
        (["logs", "a-job", "-f"], {}, "wants a token"),
        pytest.param(["cancel", "a-job"], {}, "wants a token", marks=pytest.mark.slow),
    ],
)
def test_who_has_no_token_is_told_what_to_set(
    cluster: dict[str, Any],
    job_file: Callable[..., Path],
    command: list[str],
    variables: dict[str, str],
    told: str,
) -> None:
    given = [str(job_file()) if part == "JOB" else part for part in command]
    address = cluster["dashboard"]
    outcome = quantfleet_process(*given, "--address", address, **variables)
    assert outcome.code == 4, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: the Ray cluster at {address} {told}: {WHAT_TO_SET}")


def test_run_without_a_token_is_told_too(
    cluster: dict[str, Any], job_file: Callable[..., Path]
) -> None:
    outcome = quantfleet_process("run", "--address", cluster["address"], job_file())
    assert outcome.code == 4, outcome
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"error: no Ray cluster at {cluster['address']}: ")
    assert WHAT_TO_SET in last


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("localhost", marks=pytest.mark.slow)])
def test_run_finds_nodes_on_the_loopback(
    cluster: dict[str, Any], job_file: Callable[..., Path], host: str
) -> None:
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    address = f"{host}:{cluster['address'].rpartition(':')[2]}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["token"]}
    outcome = quantfleet_process("run", "--address", address, job_file(), **token)
    assert outcome.code == 0, outcome


def test_loopback_addresses_are_known() -> None:
    for address in ("127.0.0.1:6379", "127.1.2.3:1", "localhost:6379", "[::1]:6379"):
        assert is_loopback(address)
    for address in ("auto", "10.0.0.1:6379", "head:6379", "local", "::1"):
        assert not is_loopback(address)
