"""One suite for both stores: what the design needs of a folder it needs of S3 too."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from quantcore.errors import StoreError
from workers.store import LocalStore, Store, open_store, probe, safe_name

ESCAPES = [
    "../up",
    "a/../../up",
    "a/..",
    "/etc/passwd",
    "model//etc/passwd",
    "model/",
    "./a",
    "a\\..\\up",
    "a\0b",
    "",
    ".",
    "..",
]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "deep" / "store"))
    return open_store(f"{request.getfixturevalue('bucket')}/deep/store")


def test_what_was_put_is_there_until_it_is_deleted(store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    assert not store.exists("a/b.bin")
    store.put("a/b.bin", b"first")
    store.put("a/b.bin", b"second")
    assert store.exists("a/b.bin")
    assert store.get("a/b.bin") == b"second"
    local = tmp_path / "copy"
    store.get_file("a/b.bin", local)
    assert local.read_bytes() == b"second"
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")
    assert store.list() == []
    store.delete("a/b.bin")  # gone is gone


def test_a_file_of_more_than_one_part_comes_back(store: Store, tmp_path: Path) -> None:
    local, copy = tmp_path / "local", tmp_path / "copy"
    local.write_bytes(bytes(range(256)) * 50_000)  # S3 takes it in parts
    store.put_file("model/block.safetensors", local)
    store.get_file("model/block.safetensors", copy)
    assert copy.read_bytes() == local.read_bytes()
    assert store.list() == ["model/block.safetensors"]


def test_list_names_what_begins_with_a_prefix_in_order(store: Store) -> None:
    names = ["ledger/b.json", "ledger/a.json", "ledgers.txt", "model/x"]
    for name in names:
        store.put(name, b"")
    assert store.list() == sorted(names)
    assert store.list("ledger/") == ["ledger/a.json", "ledger/b.json"]
    assert store.list("none/") == []


def test_stores_beside_each_other_do_not_see_each_other(store: Store) -> None:
    beside = open_store(f"{store.url}-2")
    beside.put("theirs", b"")
    store.put("ours", b"")
    assert (store.list(), beside.list()) == (["ours"], ["theirs"])


def test_a_folder_is_no_file(store: Store) -> None:
    store.put("a/b", b"")
    assert not store.exists("a")


def test_put_if_absent_keeps_what_is_there(store: Store) -> None:
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    assert store.get("a") == b"first"
    store.delete("a")
    assert store.put_if_absent("a", b"third")


def test_put_if_absent_has_one_winner_among_many(store: Store) -> None:
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        own = open_store(store.url)  # as every worker has its own
        barrier.wait(timeout=60)
        return own.put_if_absent("ledger/block", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert store.get("ledger/block") == f"writer {won.index(True)}".encode()
    assert store.list() == ["ledger/block"]


def test_probe_accepts_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    probe(store)
    assert store.list() == []
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_no_name_leads_out(store: Store, tmp_path: Path, name: str) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"")
    actions: list[Callable[[], object]] = [
        lambda: safe_name(name),
        lambda: store.put(name, b""),
        lambda: store.put_file(name, local),
        lambda: store.put_if_absent(name, b""),
        lambda: store.get(name),
        lambda: store.get_file(name, local),
        lambda: store.exists(name),
        lambda: store.delete(name),
    ]
    for action in actions:
        with pytest.raises(StoreError, match="leads out of its folder"):
            action()
    assert list(tmp_path.iterdir()) == [local]


@pytest.mark.parametrize("name", ["a", "a/b.c", ".hidden", "a..b", "...", "a b", "ü/é"])
def test_a_plain_name_is_taken_as_it_is(store: Store, name: str) -> None:
    assert safe_name(name) == name
    store.put(name, b"1")
    assert store.list() == [name]


def test_what_is_missing_is_a_store_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot access 'nope'"):
        store.get("nope")
    with pytest.raises(StoreError, match="cannot access 'nope'"):
        store.get_file("nope", tmp_path / "copy")


def test_a_local_file_is_never_seen_half_way(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    versions = {bytes([letter]) * 3_000_000 for letter in b"ab"}
    store.put("model/x", min(versions))
    stop = threading.Event()
    seen: list[tuple[bytes, list[str]]] = []

    def watch() -> None:
        while not stop.is_set():
            seen.append((store.get("model/x"), store.list()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in [*versions, *versions, *versions]:
        store.put("model/x", version)
        assert not store.put_if_absent("model/x", b"half")
    stop.set()
    watcher.join()
    assert seen
    assert {data for data, _ in seen} <= versions
    assert all(names == ["model/x"] for _, names in seen)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("x", b"whole")
    with pytest.raises(StoreError):
        store.put_file("x", tmp_path / "nope")
    assert store.get("x") == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_swept_away(store: Store, tmp_path: Path) -> None:
    store.put("model/x", b"whole")
    store.put("ledger/y", b"whole")
    left = [tmp_path / "deep/store" / name for name in ("model/.new-1a", "ledger/.new-2b")]
    if isinstance(store, LocalStore):
        for path in left:
            path.write_bytes(b"ha")
    store.sweep("model")
    store.sweep("kept")  # which nobody has made
    assert store.list() == ["ledger/y", "model/x"]
    assert not left[0].exists() and left[1].exists() == isinstance(store, LocalStore)
    with pytest.raises(StoreError):
        store.sweep("../elsewhere")


class _Overwrites(LocalStore):
    """A store without conditional writes, as some S3 servers are."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.put(name, data)
        return True


class _OverwritesAndLies(LocalStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._answers = [True, False]

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.put(name, data)
        return self._answers.pop(0)


@pytest.mark.parametrize("twin", [_Overwrites, _OverwritesAndLies])
def test_probe_refuses_a_store_that_overwrites(tmp_path: Path, twin: type[LocalStore]) -> None:
    with pytest.raises(StoreError, match="overwrites where it was asked not to"):
        probe(twin(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


_SECRET = "a-key-that-must-stay-secret"
_TROUBLE = {
    "wrong endpoint": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "no answer from 127.0.0.1:1"),
    "credentials in the endpoint": (
        {"AWS_ENDPOINT_URL": f"http://user:{_SECRET}@127.0.0.1:1"},
        "no answer from",
    ),
    "no endpoint": ({"AWS_ENDPOINT_URL": "nowhere"}, "AWS_ENDPOINT_URL is no URL"),
    "missing bucket": ({}, "bucket"),
}


@pytest.mark.parametrize("trouble", _TROUBLE)
def test_s3_errors_are_ours_and_keep_the_secret(
    bucket: str, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    environment, expected = _TROUBLE[trouble]
    for key, value in {"AWS_SECRET_ACCESS_KEY": _SECRET, **environment}.items():
        monkeypatch.setenv(key, value)
    store = open_store("s3://no-such-bucket/x")
    for action in (lambda: probe(store), store.list):
        with pytest.raises(StoreError, match=expected) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert _SECRET not in f"{caught.value!r}{caught.value.__cause__!r}"


def test_a_server_that_does_not_answer_is_not_an_absent_file(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="no answer"):
        open_store(f"{bucket}/job").exists("manifest.json")


def test_the_bucket_to_create_is_named(bucket: str) -> None:
    with pytest.raises(StoreError, match="no bucket 'no-such-bucket': create it"):
        probe(open_store("s3://no-such-bucket/x"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gs://bucket/x", "no store at 'gs://': name a folder or s3://bucket/path"),
        ("S3://bucket/x", "no store at 'S3://'"),
        ("s3://", "no store at 's3://'"),
        (f"s3://{_SECRET}@bucket/x", "keep credentials out of the URL"),
        (f"s3://AKIA:{_SECRET}/with/slashes@bucket/x", "keep credentials out of the URL"),
    ],
)
def test_what_is_no_store_is_refused(url: str, expected: str) -> None:
    with pytest.raises(StoreError, match=expected) as caught:
        open_store(url)
    assert _SECRET not in str(caught.value)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    assert isinstance(store, LocalStore)
    assert urlsplit(store.url).path == str(tmp_path)
