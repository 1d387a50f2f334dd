"""Jobs on real Ray nodes, several on this machine: the same bytes on any number, after kills."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import finish, start, wait_for
from tests.deep import make_site, model_bytes, records, write_job
from workers.layout import REPORT

pytestmark = pytest.mark.timeout(900)

_TIMEOUT_S = 300  # it ends a hang, it measures nothing
OTHER_KIND = {"ATEN_CPU_CAPABILITY": "default"}  # a node's environment: other instructions
SOON = {  # dead nodes are noticed in seconds
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], text_file: Path
) -> Path:
    return make_site(tmp_path_factory.mktemp("cluster"), model_folder("llama"), text_file)


@contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    """A head that takes no work, and nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    args = {"num_cpus": 0, "_system_config": SOON, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=args)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield cluster
    finally:
        cluster.shutdown()


def _run(
    site: Path, store: str, workers: int, cluster: Any, *options: str | Path
) -> subprocess.Popen[str]:
    return start("run", "--address", cluster.address, *options, write_job(site, store, workers))


@pytest.mark.parametrize(
    "nodes", [pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 4)]
)
def test_any_number_of_nodes_gives_the_same_bytes(site: Path, nodes: int) -> None:
    with _cluster(nodes) as cluster:
        outcome = finish(_run(site, f"nodes-{nodes}", nodes, cluster))
    assert outcome.code == 0, outcome
    assert model_bytes(site, f"nodes-{nodes}") == model_bytes(site, "whole")


def test_nodes_that_die_and_nodes_that_come_change_no_bit(site: Path) -> None:
    """Of two nodes one is killed, another joins, then the other first one is killed too."""
    with _cluster(2) as cluster:
        first, second = list(cluster.worker_nodes)
        process = _run(site, "killed", 2, cluster)
        wait_for(lambda: records(site, "killed") >= 3, process)
        cluster.remove_node(first, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        wait_for(lambda: records(site, "killed") >= 7, process)
        cluster.remove_node(second, allow_graceful=False)
        outcome = finish(process)
    assert outcome.code == 0, outcome
    assert "is lost" in outcome.err
    assert model_bytes(site, "killed") == model_bytes(site, "whole")
    profile = _report(site, "killed")["profile"]
    there = sum(profile["total"]["seconds"].values())
    assert there <= profile["workers"] * profile["wall_seconds"] + 1e-3  # not all were to the end


@pytest.mark.slow
def test_nodes_of_another_kind_are_passed_over(site: Path) -> None:
    """One of three, which has as much room as each of the others."""
    log = site / "kinds.jsonl"
    with _cluster(1) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=OTHER_KIND)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        process = _run(site, "kinds", 2, cluster, "--log-file", log)
        outcome = finish(process)
    assert outcome.code == 0, outcome
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [e for e in events if e["event"] == "machine refused"]
    assert model_bytes(site, "kinds") == model_bytes(site, "whole")


def test_nodes_of_several_kinds_share_a_job(site: Path) -> None:
    """Which bits come out hangs on who did what; how good they are does not."""
    log = site / "mixed.jsonl"
    with _cluster(1) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=OTHER_KIND)
        job = write_job(site, "mixed", 2, kind="mixed")
        outcome = finish(start("run", "--address", cluster.address, "--log-file", log, job))
    assert outcome.code == 0, outcome
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["present"] for e in events if e["event"] == "workers started"] == [2]
    collected = {e["worker"] for e in events if e.get("kind") == "Collect"}
    assert len(collected) == 2
    profile = _report(site, "mixed")["profile"]
    there = sum(profile["total"]["seconds"].values())
    assert there == pytest.approx(2 * profile["wall_seconds"], abs=1e-3)
    assert {"forward", "hessian", "solve"} <= set(profile["blocks"][-1]["seconds"])
    ours, theirs = (_errors(site, store) for store in ("mixed", "whole"))
    assert ours == pytest.approx(theirs, rel=0.2)
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.02)


def _report(site: Path, store: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((site / store / "job" / REPORT).read_text())
    return report


def _errors(site: Path, store: str) -> list[float]:
    return [line["relative_output_error"] for line in _report(site, store)["layers"]]


# In a process of its own: Ray is not to be started twice in one. Two workers are wanted, and on
# each side there is a node too few or one of another kind.
_COMES_AND_GOES = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from orchestrator.checks import check
from orchestrator.ray_cluster import joined
from orchestrator.site import Site

job, other = Path(sys.argv[1]), json.loads(sys.argv[2])
args = {"num_cpus": 0, "_system_config": json.loads(sys.argv[3]), "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=args)
first = cluster.add_node(num_cpus=2)
cluster.add_node(num_cpus=1, env_vars=other)
site = Site(cluster=joined(cluster.address))
prepared = check(job, look_at=site.look_at)
executor = site.start_workers(prepared.plan, prepared)
while len(executor.present()) < 2:  # they may come one by one
    executor.next_news()
told = []
nodes = [executor._members[number].node for number in executor.present()]
cluster.add_node(num_cpus=8, env_vars=other)
cluster.remove_node(first, allow_graceful=False)
for _ in range(3):
    told.append(type(executor.next_news()).__name__)
cluster.add_node(num_cpus=1)
told.append(type(executor.next_news()).__name__)
nodes += [executor._members[number].node for number in executor.present()]
told.append(len(set(nodes)))
executor.close()
cluster.shutdown()
print(json.dumps(told))
"""


def test_a_node_that_comes_is_taken_or_refused_once(site: Path) -> None:
    job = write_job(site, "comes", 2)
    command = [sys.executable, "-c", _COMES_AND_GOES, job, json.dumps(OTHER_KIND), json.dumps(SOON)]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    *news, arrival, nodes = told
    assert sorted(news) == ["Loss", "Loss", "Refusal"]
    assert arrival == "Arrival"
    assert nodes == 2
