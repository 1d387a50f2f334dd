"""Who may drive a job: whoever wrote the newest epoch.

    ledger/epoch-000003.json   put if absent: this driver is the third; its number is its right
    ledger/beat-000003.json    written over and over while it lives, last of all as "released"

To take a job over, a driver watches the newest one's beat. If that changes, the other lives and
this one is refused; if it stays the same for long enough by this driver's own clock, the next
epoch is taken. No two clocks are ever compared. A driver that was only slow, or asleep, finds the
later epoch before it next writes, and writes nothing more.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantcore.errors import LeaseError, QuantfleetError, StoreError
from workers.layout import beat_name, dump, epoch_name
from workers.store import Store

_SILENT_BEATS = 5  # without a change, and a driver counts as gone


@dataclass(frozen=True, slots=True)
class Beat:
    every_s: float = 3.0

    @classmethod
    def from_environment(cls) -> "Beat":
        return cls(float(os.environ.get("QUANTFLEET_BEAT_S", "3")))


class Lease:
    """Held from `take` to `release`; a thread keeps its beat going."""

    def __init__(self, store: Store, epoch: int, me: dict[str, Any], beat: Beat) -> None:
        self.epoch = epoch
        self._store = store
        self._me = me
        self._beat = beat
        self._count = 0
        self._ended = threading.Event()
        self._successor = False
        self._write_beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseError if another driver took the job over. To be called before writing."""
        if self._successor or self._store.exists(epoch_name(self.epoch + 1)):
            self._successor = True
            raise LeaseError(f"another driver has taken {self._store.url} over: this one stops")

    @property
    def lost(self) -> bool:
        """What the last beat found, without asking the store."""
        return self._successor

    def release(self) -> None:
        """Leave the job to whoever comes next, at once."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(QuantfleetError):  # then it is found silent, a little later
            if not self._successor and not self._store.exists(epoch_name(self.epoch + 1)):
                self._write_beat(released=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat.every_s):
            with contextlib.suppress(QuantfleetError):  # a store that is away: beat on
                if self._store.exists(epoch_name(self.epoch + 1)):
                    self._successor = True
                    return
                self._write_beat()

    def _write_beat(self, released: bool = False) -> None:
        self._count += 1
        facts = {**self._me, "beat": self._count, "released": released}
        self._store.put(beat_name(self.epoch), dump(facts))


# told of a driver that may be gone, and for how many seconds it will be watched
Waiting = Callable[[dict[str, Any], float], None]


def watch(store: Store, beat: Beat, waiting: Waiting = lambda *_: None) -> int:
    """The newest epoch, whose driver left or is silent; 0 where there was none.

    Raises LeaseError if the driver of that epoch lives.
    """
    newest = _newest(store)
    if newest:
        _refuse_living(store, newest, beat, waiting)
    return newest


def take(store: Store, beat: Beat, left: int, waiting: Waiting = lambda *_: None) -> Lease:
    """Become the driver of a job after epoch `left`, which `watch` found free.

    Raises LeaseError if another one came first, and lives.
    """
    me = {"driver": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
    # the random name in it makes this ours alone, even if the answer is lost and asked again
    record = dump({**me, "every_s": beat.every_s})
    while _newest(store) != left or not store.put_if_absent(epoch_name(left + 1), record):
        left = watch(store, beat, waiting)
    return Lease(store, left + 1, me, beat)


def _newest(store: Store) -> int:
    prefix = epoch_name(0).partition("0")[0]
    numbers = [name.removeprefix(prefix).removesuffix(".json") for name in store.list(prefix)]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _refuse_living(
    store: Store,
    epoch: int,
    beat: Beat,
    waiting: Waiting,
) -> None:
    """Return once the driver of an epoch has released it, or is silent for too long."""
    holder = _read(store, epoch_name(epoch))
    watch_s = _SILENT_BEATS * max(beat.every_s, float(holder.get("every_s", 0)))
    seen = _read(store, beat_name(epoch))
    started = time.monotonic()
    while not seen.get("released"):
        if time.monotonic() - started >= watch_s:
            return
        if time.monotonic() - started < beat.every_s / 2:
            waiting(holder, watch_s)
        time.sleep(beat.every_s / 2)
        now = _read(store, beat_name(epoch))
        if now != seen and not now.get("released"):
            raise LeaseError(
                f"another driver is at work on {store.url} (on {holder.get('host')}, process "
                f"{holder.get('pid')}): end it first, or let it finish"
            )
        seen = now


def _read(store: Store, name: str) -> dict[str, Any]:
    """A record, or nothing: it may not be written yet."""
    if not store.exists(name):
        return {}
    try:
        facts: dict[str, Any] = json.loads(store.get(name))
    except ValueError:
        raise StoreError(f"{store.url}: {name} is not JSON") from None
    return facts
