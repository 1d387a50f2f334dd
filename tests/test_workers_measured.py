"""The measurement cache: many write and tidy at once, nothing is lost, what is no use is named."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from quantcore.autoquant.measurements import Measurements, Timing, merged, written
from quantcore.errors import StoreError
from tests.test_autoquant_measurements import CPU, H200, PRODUCT, TIMING, only
from workers.measured import keep, known, open_measurements, read, tidy
from workers.store import LocalStore, Store


def of(tokens: Iterable[int], timing: Timing = TIMING) -> Measurements:
    return Measurements(of={H200: {replace(PRODUCT, tokens=t): timing for t in tokens}})


def tokens_in(store: Store) -> list[int]:
    return sorted(product.tokens for product in read(store).of[H200])


def test_what_several_wrote_is_read_together_the_better_known_first(tmp_path: Path) -> None:
    store = open_measurements(str(tmp_path))
    assert read(store) == Measurements(of={})
    finer = replace(TIMING, low_us=9.9, high_us=10.1)
    parts = [of([1, 2]), of([2, 4], finer), only(TIMING, CPU)]
    for part in (*parts, parts[0]):
        keep(store, part)
    assert len(store.list()) == 3
    assert read(store) == merged(parts)
    assert read(store).of[H200][replace(PRODUCT, tokens=2)] == finer
    assert Path(store.url) == tmp_path / "measurements"


def test_only_times_of_this_kind_are_known_and_others_are_named(tmp_path: Path) -> None:
    store = open_measurements(str(tmp_path))
    keep(store, of([1]))
    keep(store, only(TIMING, replace(H200, driver="580.2")))
    store.put("damaged.json", written(of([8])).encode()[:-40])
    store.put("later.json", b'{"version": 9}')
    store.put("bytes.json", b"\xff\xfe")
    strange = written(of([16])).replace("int4 sym g128 triton_tiled", "int3 sym")
    store.put("strange.json", strange.encode())
    store.put("readme.txt", b"not ours")
    told: list[str] = []
    assert known(store, H200, told.append) == {PRODUCT: TIMING}
    for words in (
        "bytes.json is ignored: 'utf-8' codec can't decode",
        "damaged.json is ignored: measurements: damaged",
        "later.json is ignored: measurements: version 9 where this reads 1",
        "strange.json: a measurement is ignored: no candidate is called 'int3 sym'",
        "times of another kind are ignored (1): driver 580.2 and not 570.1",
    ):
        assert sum(words in line for line in told) == 1, (words, told)
    assert len(told) == 5


def test_tidying_leaves_one_file_and_what_it_cannot_read_to_the_end(tmp_path: Path) -> None:
    store = open_measurements(str(tmp_path))
    for t in (1, 2, 3):
        keep(store, of([t]))
    strange = written(of([16, 32])).replace("int4 sym g128 triton_tiled", "int3 sym", 1)
    store.put("strange.json", strange.encode())
    before = read(store)
    tidy(store)
    assert len(store.list()) == 2
    assert store.get("strange.json") == strange.encode()
    assert read(store) == before
    tidy(store)
    assert len(store.list()) == 2


class _Goes(LocalStore):
    """A file is deleted after it was listed, once its content stands in another."""

    def get(self, name: str) -> bytes:
        if len(super().list()) > 1:
            tidy(LocalStore(Path(self.url)))
        return super().get(name)


def test_a_file_that_goes_while_it_is_read_is_looked_for_again(tmp_path: Path) -> None:
    store = _Goes(tmp_path)
    for t in (1, 2, 3):
        keep(store, of([t]))
    assert tokens_in(store) == [1, 2, 3]


class _Locked(LocalStore):
    def get(self, name: str) -> bytes:
        raise StoreError(f"{self.url}: cannot access '{name}': Permission denied")


def test_a_file_that_is_there_and_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    keep(LocalStore(tmp_path), of([1]))
    with pytest.raises(StoreError, match="Permission denied"):
        read(_Locked(tmp_path))


class _Torn(LocalStore):
    """Its first listing has neither what was merged away nor what it was merged into."""

    listings = 0

    def list(self, prefix: str = "") -> list[str]:
        self.listings += 1
        names = super().list(prefix)
        return names[1:] if self.listings == 1 else names


@pytest.mark.parametrize("count", [1, 3])
def test_a_listing_that_lacks_a_file_is_not_the_last(tmp_path: Path, count: int) -> None:
    for tokens in range(1, count + 1):
        keep(LocalStore(tmp_path), of([tokens]))
    assert tokens_in(_Torn(tmp_path)) == list(range(1, count + 1))


def test_nothing_is_lost_where_many_write_tidy_and_read_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writers, each = 6, 12
    start = threading.Barrier(writers)

    def write(writer: int) -> None:
        start.wait()
        for turn in range(each):
            mine = writer * each + turn + 1
            keep(store, of([mine]))
            assert mine in tokens_in(store)  # whatever the others tidied meanwhile
            if turn % 4 == writer % 4:
                tidy(store)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert tokens_in(store) == list(range(1, writers * each + 1))


def test_a_bucket_keeps_measurements_as_a_folder_does(bucket: str) -> None:
    store = open_measurements(f"{bucket}/artifacts/")
    assert read(store) == Measurements(of={})
    for t in (1, 2):
        keep(store, of([t]))
    tidy(store)
    assert store.url == f"{bucket}/artifacts/measurements"
    assert len(store.list()) == 1
    told: list[str] = []
    assert sorted(p.tokens for p in known(store, H200, told.append)) == [1, 2]
    assert told == []


def test_the_cache_is_no_job_of_its_store(tmp_path: Path) -> None:
    from orchestrator.stored import jobs_in

    keep(open_measurements(str(tmp_path)), of([1]))
    assert jobs_in(LocalStore(tmp_path)) == []
