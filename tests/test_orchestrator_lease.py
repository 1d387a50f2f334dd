"""Exactly one driver at a time, by the store alone and without comparing clocks."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.lease import Beat, Lease, take, watch
from quantcore.errors import LeaseError
from workers.layout import beat_name, epoch_name
from workers.store import Store, open_store

BEAT = Beat(every_s=0.1)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "job"))
    return open_store(f"{request.getfixturevalue('bucket')}/job")


@pytest.fixture
def held(store: Store) -> Iterator[Lease]:
    lease = take(store, BEAT, watch(store, BEAT))
    yield lease
    lease.release()


def test_the_first_driver_is_the_first(held: Lease) -> None:
    assert held.epoch == 1
    held.check()


def test_a_driver_that_lives_is_not_disturbed(store: Store, held: Lease) -> None:
    with pytest.raises(LeaseError, match="another driver is at work"):
        watch(store, BEAT)
    with pytest.raises(LeaseError, match="another driver is at work"):
        take(store, BEAT, 0)
    held.check()
    assert not store.exists(epoch_name(2))


def test_a_driver_that_left_is_followed_at_once(store: Store, held: Lease) -> None:
    held.release()
    start = time.monotonic()
    follower = take(store, BEAT, watch(store, BEAT))
    follower.release()
    assert follower.epoch == 2
    assert time.monotonic() - start < 5  # a released lease is not watched: no wait of any length


def test_a_silent_driver_is_followed_and_told(store: Store, held: Lease) -> None:
    """It is only asleep: it wakes, finds the later epoch and writes nothing more."""
    held._ended.set()  # its thread stops as in a process that is stopped
    held._thread.join()
    told = []
    follower = take(store, BEAT, watch(store, BEAT, lambda holder, s: told.append((holder, s))))
    assert follower.epoch == 2
    assert told[0][0]["pid"]
    beat = store.get(beat_name(1))
    with pytest.raises(LeaseError, match="has taken"):
        held.check()
    held.release()
    assert store.get(beat_name(1)) == beat
    follower.check()
    follower.release()


def test_the_thread_finds_a_later_epoch_by_itself(store: Store, held: Lease) -> None:
    store.put(epoch_name(2), b"{}")
    for _ in range(100):
        if held.lost:
            break
        time.sleep(0.05)
    assert held.lost


def test_one_of_many_that_follow_wins(store: Store) -> None:
    barrier = threading.Barrier(6)

    def follow(_: int) -> Lease | None:
        own = open_store(store.url)
        left = watch(own, BEAT)
        barrier.wait(timeout=60)
        try:
            return take(own, BEAT, left)
        except LeaseError:
            return None

    with ThreadPoolExecutor(6) as pool:
        leases = [lease for lease in pool.map(follow, range(6)) if lease]
    assert len(leases) == 1
    assert leases[0].epoch == 1
    leases[0].release()
    assert json.loads(store.get(beat_name(1)))["released"]


def test_an_answer_that_was_lost_is_no_defeat(store: Store) -> None:
    """The same request sent again finds its own record and counts as the winner."""
    assert store.put_if_absent(epoch_name(1), b"mine")
    assert store.put_if_absent(epoch_name(1), b"mine")
    assert not store.put_if_absent(epoch_name(1), b"theirs")
