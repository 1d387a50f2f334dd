"""Ray nodes with addresses of their own, `ray start` on each: network namespaces on this machine.

sudo PYTHONPATH=.:kernels python -m pytest -m netns tests/test_network.py
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.command import finish, wait_for
from tests.deep import make_site, model_bytes, records, write_job
from tests.namespaces import Network

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]

_PORT = 6379
_START_S = 120  # far beyond what a node takes
_SOON = {  # dead nodes are noticed in seconds
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], text_file: Path
) -> Path:
    return make_site(tmp_path_factory.mktemp("network"), model_folder("llama"), text_file)


class _Cluster:
    """One Ray node of one CPU on each machine of a network; the first one is the head."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._folder = folder
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        bin_folder = str(Path(sys.executable).parent)
        path = {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        self._env = os.environ | token | path
        self.address = f"{network.address(0)}:{_PORT}"

    def start(self, machine: int) -> None:
        role = [f"--address={self.address}"]
        if machine == 0:
            config = f"--system-config={json.dumps(_SOON)}"
            role = ["--head", f"--port={_PORT}", "--include-dashboard=false", config]
        log = self._folder / f"{machine}.log"
        command: list[str | Path] = [
            Path(sys.executable).parent / "ray",
            "start",
            *role,
            f"--node-ip-address={self._network.address(machine)}",
            "--num-cpus=1",
            "--num-gpus=0",
            f"--object-store-memory={80 * 2**20}",
            f"--temp-dir={self._folder / str(machine)}",
            "--disable-usage-stats",
            "--block",
        ]
        process = self._network.start(machine, command, self._env, log)
        end = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def run(self, job: Path, *options: str | Path) -> "subprocess.Popen[str]":
        """A job whose driver is on the head."""
        command = [sys.executable, "-m", "orchestrator", "run", "--address", self.address]
        command += [*map(str, options), str(job)]
        return self._network.start(0, command, self._env, None)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[_Cluster, Network]]:
    """As many machines as the test's parameter says."""
    # Ray's sockets want short paths
    folder = Path(tempfile.mkdtemp(prefix="quantfleet-", dir="/tmp"))
    try:
        with Network(request.param) as network:
            cluster = _Cluster(network, folder)
            for machine in range(request.param):
                cluster.start(machine)
            yield cluster, network
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_nothing_is_left_of_a_network_that_failed() -> None:
    def namespaces() -> str:
        command = ["ip", "netns", "list"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    before = namespaces()
    with pytest.raises(ZeroDivisionError), Network(2) as network:
        process = network.start(1, ["sleep", "1000"], dict(os.environ), None)
        assert namespaces() != before
        network.cut(0)
        raise ZeroDivisionError
    assert not psutil.pid_exists(process.pid)
    assert namespaces() == before


@pytest.mark.parametrize(("cluster", "nodes"), [(1, 1), (2, 2), (4, 4)], indirect=["cluster"])
def test_any_number_of_machines_gives_the_same_bytes(
    site: Path, cluster: tuple[_Cluster, Network], nodes: int
) -> None:
    job, log = write_job(site, f"machines-{nodes}", nodes), site / f"machines-{nodes}.jsonl"
    outcome = finish(cluster[0].run(job, "--log-file", log))
    assert outcome.code == 0, outcome
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({e["worker"] for e in events if e["event"] == "task finished"}) == nodes
    assert model_bytes(site, f"machines-{nodes}") == model_bytes(site, "whole")


@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_a_machine_whose_link_is_cut_changes_no_bit(
    site: Path, cluster: tuple[_Cluster, Network]
) -> None:
    ray, network = cluster
    process = ray.run(write_job(site, "cut", 3))
    wait_for(lambda: records(site, "cut") >= 4, process)
    network.cut(2)
    outcome = finish(process)
    assert outcome.code == 0, outcome
    assert "is lost" in outcome.err
    assert model_bytes(site, "cut") == model_bytes(site, "whole")
