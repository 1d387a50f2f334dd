"""A worker's clock: each moment is told once, to the part and the block that it belongs to."""

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.clock import Clock, TimedSource
from workers.tasks import Account, Advance, Collect, Embed, Evaluate, Settle, Solve, Survey, Task

CPU = torch.device("cpu")


class Device:
    """A host and an accelerator that works behind it; a moment is when the device gets there."""

    def __init__(self) -> None:
        self.host = 0.0
        self.busy_until = 0.0
        self.waits = 0

    def host_works(self, seconds: float) -> None:
        self.host += seconds

    def is_given(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + seconds

    def now(self) -> float:
        return max(self.busy_until, self.host)

    def passed(self, moment: float) -> bool:
        return moment <= self.host

    def wait(self, moment: float) -> None:
        self.waits += 1
        self.host = max(self.host, moment)

    def seconds(self, start: float, end: float) -> float:
        return end - start


class Host(Device):
    """Without an accelerator: what it is given it does at once."""

    def is_given(self, seconds: float) -> None:
        self.host += seconds


def rows(told: list[dict[str, Any]]) -> dict[int | None, dict[str, float]]:
    """Seconds by block and part, without parts of no length."""
    spent = {row["block"]: {p: s for p, s in row["seconds"].items() if s} for row in told}
    return {block: parts for block, parts in spent.items() if parts}


def made_by_a_thread(seconds: float) -> "Future[tuple[str, float]]":
    future: Future[tuple[str, float]] = Future()
    future.set_result(("made", seconds))
    return future


def test_what_happens_within_a_part_is_taken_out_of_it() -> None:
    host = Host()
    clock = Clock(CPU, host)
    with clock.task(Collect(3, (0,), (1,))):
        host.is_given(1.0)
        with clock.spent("hessian"):
            host.is_given(0.25)
        with clock.spent("read"), clock.spent("read"):
            host.is_given(0.5)
        host.is_given(2.0)
    assert rows(clock.told()) == {3: {"forward": 3.0, "hessian": 0.25, "read": 0.5}}
    assert clock.told() == []


def test_the_time_between_tasks_belongs_to_the_block_of_the_next() -> None:
    host = Host()
    clock = Clock(CPU, host)
    host.is_given(9.0)  # before the first one: nobody knows since when it was wanted
    with clock.task(Embed((0,))):
        host.is_given(1.0)
    host.is_given(0.5)
    with clock.task(Solve(4, 0, ())):
        host.is_given(2.0)
    assert rows(clock.told()) == {None: {"forward": 1.0}, 4: {"waiting": 0.5, "solve": 2.0}}


@pytest.mark.parametrize(
    "task", [Survey(()), Evaluate("original", None, None), Account()], ids=type
)  # type: ignore[arg-type]
def test_tasks_that_are_no_blocks_work_are_not_told_of(task: Task) -> None:
    host = Host()
    clock = Clock(CPU, host)
    with clock.task(Embed((0,))):
        host.is_given(1.0)
    host.is_given(4.0)
    with clock.task(task), clock.spent("read"):
        host.is_given(8.0)
        assert clock.awaited("read", made_by_a_thread(3.0)) == "made"
    host.is_given(16.0)
    with clock.task(Settle(0)):
        host.is_given(32.0)
    assert rows(clock.told()) == {None: {"forward": 1.0}, 0: {"write": 32.0}}


def test_an_error_within_a_part_ends_the_part() -> None:
    host = Host()
    clock = Clock(CPU, host)
    with clock.task(Collect(0, (0,), (1,))):
        with pytest.raises(MemoryError), clock.spent("hessian"):
            host.is_given(1.0)
            raise MemoryError
        host.is_given(2.0)
    assert rows(clock.told()) == {0: {"hessian": 1.0, "forward": 2.0}}


def test_a_devices_time_is_told_late_to_the_block_it_belongs_to_and_nobody_waits() -> None:
    device = Device()
    clock = Clock(CPU, device)
    with clock.task(Collect(0, (0,), (1,))):
        device.host_works(0.01)
        device.is_given(5.0)
    assert clock.told() == []
    with clock.task(Advance(0, (0,))):
        device.is_given(3.0)
    with clock.task(Collect(1, (0,), (1,))):
        device.is_given(4.0)
        device.host_works(6.0)
    told = rows(clock.told())
    assert told[0] == pytest.approx({"forward": 0.01 + 5.0})  # of Advance not all has passed
    with clock.task(Settle(0)):
        device.host_works(20.0)  # it had 6 s left to do
    assert device.waits == 0
    told = rows(clock.told(wait=True))
    assert told[0] == pytest.approx({"forward": 3.0, "write": 26.01 - 12.01})
    assert told[1] == pytest.approx({"forward": 4.0})


def test_what_is_left_at_the_end_is_told_once_the_device_is_done() -> None:
    device = Device()
    clock = Clock(CPU, device)
    with clock.task(Solve(7, 0, ())):
        device.is_given(5.0)
    with clock.task(Account()):
        pass
    assert rows(clock.told(wait=True)) == {7: {"solve": 5.0}}


def test_of_a_threads_work_the_wait_is_spent_and_the_rest_is_hidden() -> None:
    device = Device()
    clock = Clock(CPU, device)
    late, early = made_by_a_thread(5.0), made_by_a_thread(3.0)
    with clock.task(Collect(2, (0,), (1,))):
        device.is_given(1.0)
        device.host_works(3.0)  # as if it waited for the first: for 2 s the device has nothing
        result = clock.awaited("read", late)
        device.is_given(10.0)
        with clock.spent("read"):
            clock.awaited("read", early)
    (row,) = clock.told(wait=True)
    assert result == "made"
    assert row["seconds"] == pytest.approx({"forward": 13.0, "read": 0.0})
    assert row["hidden"] == {"read": 8.0}


class _Slow(Future[tuple[str, float]]):
    """Its result comes after a while."""

    def __init__(self, device: Device, seconds: float) -> None:
        super().__init__()
        self._device, self._seconds = device, seconds
        self.set_result(("made", 5.0))

    def result(self, timeout: float | None = None) -> tuple[str, float]:
        self._device.host_works(self._seconds)
        return super().result(timeout)


@pytest.mark.parametrize(("left", "spent"), [(0.0, 2.0), (0.5, 1.5), (2.0, 0.0), (9.0, 0.0)])
def test_a_wait_during_which_the_device_had_work_left_is_hidden_too(
    left: float, spent: float
) -> None:
    device = Device()
    clock = Clock(CPU, device)
    with clock.task(Settle(2)):
        device.is_given(left)
        clock.awaited("write", _Slow(device, 2.0))
    (row,) = clock.told(wait=True)
    assert row["seconds"]["write"] == pytest.approx(left + spent)
    assert row["hidden"]["write"] == pytest.approx(5.0 - spent)


Program = list[tuple[str, float]]
PROGRAMS = st.lists(
    st.tuples(
        st.sampled_from(["host", "device", "hessian", "read", "end", "task"]), st.floats(0, 9)
    ),
    max_size=40,
)


@given(program=PROGRAMS, accelerated=st.booleans())
@settings(max_examples=60, deadline=None)
def test_all_parts_together_are_all_the_time_there_was(program: Program, accelerated: bool) -> None:
    device = Device() if accelerated else Host()
    clock = Clock(CPU, device)
    steps = iter(program)
    begun = device.now()

    def run(depth: int) -> None:
        for what, seconds in steps:
            if what == "host":
                device.host_works(seconds)
            elif what == "device":
                device.is_given(seconds)
            elif what in {"hessian", "read"} and depth < 3:
                with clock.spent(what):  # type: ignore[arg-type]
                    run(depth + 1)
            elif what == "task" and depth == 1:
                told.extend(clock.told())
                return
            elif what == "end" and depth > 1:
                return

    told: list[dict[str, Any]] = []
    for number in range(4):
        with clock.task(Collect(number, (0,), (1,))):
            run(1)
        device.host_works(0.125)
    ended = clock._marks[-1].at
    told += clock.told(wait=True)
    total = sum(sum(row["seconds"].values()) for row in told)
    assert total == pytest.approx(ended - begun)
    assert all(seconds >= 0 for row in told for seconds in row["seconds"].values())


def test_marks_that_have_passed_do_not_pile_up() -> None:
    host = Host()
    clock = Clock(CPU, host)
    with clock.task(Collect(0, (0,), (1,))):
        for _ in range(5000):
            with clock.spent("hessian"):
                host.is_given(1.0)
        assert len(clock._marks) < 2000
    assert rows(clock.told())[0]["hessian"] == 5000.0


class _Weights:
    path = "a model"

    def __init__(self, host: Host) -> None:
        self._host = host

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            self._host.is_given(1.0)
            yield name, torch.zeros(1)


def test_a_source_is_timed_while_it_reads_and_not_while_others_work_on_what_it_gave() -> None:
    host = Host()
    clock = Clock(CPU, host)
    source = TimedSource(_Weights(host), clock)  # type: ignore[arg-type]
    assert source.path == "a model"
    with clock.task(Solve(0, 0, ())):
        for _ in source.read(["a", "b", "c"]):
            host.is_given(10.0)
    assert rows(clock.told()) == {0: {"read": 3.0, "solve": 30.0}}
