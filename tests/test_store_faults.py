"""A store that delays, throttles, fails and drops connections: the same artifact in the end."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from quantcore.errors import StoreError
from tests.faults import KillingExecutor, schedule
from tests.proxy import FAULTS, Proxy, proxy_to
from workers.store import open_store

JobFile = Callable[..., Path]


@pytest.fixture
def proxy(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, and the environment that leads through it."""
    with proxy_to(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_outlives_a_fault(
    proxy: Proxy, bucket: str, tmp_path: Path, fault: str
) -> None:
    store = open_store(f"{bucket}/x", patience_s=60)
    data = bytes(range(256)) * 400
    local, copy = tmp_path / "local", tmp_path / "copy"
    local.write_bytes(data)
    proxy.trouble(0.4, seed=1, faults=(fault,))
    for number in range(4):
        store.put(f"a/{number}", data)
        assert store.get(f"a/{number}") == data
        store.put_file(f"b/{number}", local)
        store.get_file(f"b/{number}", copy)
        assert copy.read_bytes() == data
        assert store.put_if_absent(f"c/{number}", b"mine"), "a lost answer is no lost race"
        assert not store.put_if_absent(f"c/{number}", b"theirs")
        assert store.exists(f"c/{number}")
        assert not store.exists(f"d/{number}")
    assert len(store.list()) == 12
    assert proxy.met[fault] > 3


def test_without_patience_a_broken_store_is_told_at_once(proxy: Proxy, bucket: str) -> None:
    proxy.trouble(1.0, seed=1, faults=("503",))
    with pytest.raises(StoreError, match="reduce your request rate"):
        open_store(f"{bucket}/x").put("a", b"")


@pytest.mark.parametrize("seed", range(3))
def test_a_job_with_killed_workers_and_a_bad_store_gives_the_same_bytes(
    proxy: Proxy, bucket: str, job_file: JobFile, tmp_path: Path, seed: int
) -> None:
    whole = run_job(
        check(job_file("whole")), lambda plan: InProcessExecutor(plan, ["cpu"]), Observer()
    )
    prepared = check(job_file("job", output={"store": f"{bucket}/store"}))
    proxy.trouble(0.3, seed=seed)
    result = run_job(prepared, lambda plan: KillingExecutor(plan, 2, schedule(seed, 3)), Observer())
    assert sum(proxy.met.values()) > 5
    proxy.trouble(0.0, seed=0)
    fetch(open_store(result.store), tmp_path / "out")
    fetch(open_store(whole.store), tmp_path / "expected")
    for folder in ("out", "expected"):
        shutil.rmtree(tmp_path / folder / "report")
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        del manifest["files"]["report/report.json"], manifest["job"]
        (tmp_path / folder / "manifest.json").write_text(json.dumps(manifest))
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
