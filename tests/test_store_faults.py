"""A store that delays, throttles, fails and drops connections: the same artifact in the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantcore.errors import StoreError
from tests.behind_proxy import check_job_behind
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_job_with_killed_workers_and_a_bad_store_gives_the_same_bytes(
    proxy: Proxy, bucket: str, job_file: JobFile, tmp_path: Path, seed: int
) -> None:
    check_job_behind(proxy, bucket, job_file, tmp_path, seed)
