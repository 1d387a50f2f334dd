"""The same jobs on a real S3 server. Run with: pytest -m radosgw (Debian's Ceph packages)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.lease import Beat, take, watch
from quantcore.errors import LeaseError, SourceError
from tests.behind_proxy import check_job_behind
from tests.proxy import FAULTS, Proxy, proxy_to
from tests.rgw import Gateway, make_bucket, radosgw
from workers.sources import open_source, remote
from workers.store import open_store, probe

pytestmark = pytest.mark.radosgw

JobFile = Callable[..., Path]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with radosgw(tmp_path_factory.mktemp("ceph")) as gateway:
        yield gateway


@pytest.fixture
def proxy(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_to(gateway.url) as proxy:
        for key, value in {**gateway.environment(), "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(key, value)
        yield proxy


@pytest.fixture
def bucket(gateway: Gateway, request: pytest.FixtureRequest) -> str:
    letters = "".join(c for c in request.node.name.lower() if c.isalnum())
    return make_bucket(gateway, letters[-40:])


def test_it_honours_conditional_writes(proxy: Proxy, bucket: str) -> None:
    probe(open_store(f"{bucket}/x"))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_outlives_a_fault(
    proxy: Proxy, bucket: str, tmp_path: Path, fault: str
) -> None:
    store = open_store(f"{bucket}/x", patience_s=120)
    data = bytes(range(256)) * 400
    copy = tmp_path / "copy"
    proxy.trouble(0.4, seed=1, faults=(fault,))
    for number in range(4):
        store.put(f"a/{number}", data)
        store.get_file(f"a/{number}", copy)
        assert copy.read_bytes() == data
        assert store.put_if_absent(f"c/{number}", b"mine")
        assert not store.put_if_absent(f"c/{number}", b"theirs")
    assert len(store.list()) == 8
    assert proxy.met[fault] > 2


def test_one_driver_at_a_time(proxy: Proxy, bucket: str) -> None:
    store, beat = open_store(f"{bucket}/job"), Beat(every_s=0.3)
    lease = take(store, beat, watch(store, beat))
    with pytest.raises(LeaseError):
        watch(store, beat)
    lease.release()
    follower = take(store, beat, watch(store, beat))
    assert follower.epoch == 2
    follower.release()


@pytest.mark.parametrize("seed", range(3))
def test_a_job_with_killed_workers_and_a_bad_network_gives_the_same_bytes(
    proxy: Proxy, bucket: str, job_file: JobFile, tmp_path: Path, seed: int
) -> None:
    check_job_behind(proxy, bucket, job_file, tmp_path, seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_is_read_by_ranges_through_every_fault(
    proxy: Proxy,
    bucket: str,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(remote, "REQUEST_BYTES", 50_000)
    folder = model_folder("llama", max_shard_size="100KB")
    store = open_store(f"{bucket}/it", patience_s=60)
    for file in folder.iterdir():
        store.put_file(file.name, file)
    proxy.trouble(0.3, seed=1, faults=(fault,))
    source = open_source(store.url, patience_s=120)
    found = dict(source.read(source.tensors))
    assert proxy.met[fault] > 2
    here = dict(open_source(folder).read(source.tensors))
    assert all(torch.equal(found[name], here[name]) for name in here)
    proxy.trouble(0.0, seed=0)
    for file in folder.glob("*.safetensors"):
        store.put(file.name, file.read_bytes()[:-1] + b"x")
    with pytest.raises(SourceError, match="it has changed since it was first looked at"):
        list(source.read(["model.norm.weight"]))
