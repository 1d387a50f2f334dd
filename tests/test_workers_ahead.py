"""A remote model's blocks are fetched once and ahead of their turn, and no further than one."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcore.errors import SourceError
from workers.ahead import ReadAhead

NAMES = [f"{block}.{part}" for block in range(4) for part in "abc"]


class Source:
    """Gives a tensor when it is let to, and notes what it was asked for."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.let = {name: threading.Event() for name in NAMES}
        self.gave = threading.Condition()
        self.wrong = ""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(names):
            assert self.let[name].wait(20)
            if name == self.wrong:
                raise SourceError("it broke")
            with self.gave:
                self.given.append(name)
                self.gave.notify_all()
            yield name, torch.tensor(NAMES.index(name))

    def allow(self, *names: str) -> None:
        for name in names:
            self.let[name].set()

    def wait_for(self, *names: str) -> None:
        with self.gave:
            assert self.gave.wait_for(lambda: set(names) <= set(self.given), 20)


def block(index: int) -> list[str]:
    return [name for name in NAMES if name.startswith(f"{index}.")]


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.allow(*NAMES)  # or its threads outlive the test


def _ahead(source: Any) -> ReadAhead:
    return ReadAhead(source)


def _read(ahead: ReadAhead, *names: str) -> dict[str, int]:
    return {name: int(tensor) for name, tensor in ahead.read(names)}


def test_a_tensor_is_there_before_the_rest_of_its_block(source: Source) -> None:
    ahead = _ahead(source)
    ahead.hold(block(0), block(1))
    source.allow("0.a", "0.b")
    assert _read(ahead, "0.b", "0.a") == {"0.b": 1, "0.a": 0}
    assert source.given == ["0.a", "0.b"]


def test_the_next_block_comes_unasked_and_none_is_fetched_twice(source: Source) -> None:
    ahead = _ahead(source)
    source.allow(*NAMES)
    for index in range(4):
        later = block(index + 1)
        for _ in range(3):  # to collect, to solve, to publish
            ahead.hold(block(index), later)
            assert list(_read(ahead, *block(index)).values()) == [3 * index + n for n in range(3)]
        source.wait_for(*later)
        assert source.given == NAMES[: 3 * index + 6], "and no further"


def test_what_is_not_held_is_read_as_ever(source: Source) -> None:
    ahead = _ahead(source)
    source.allow(*NAMES)
    ahead.hold(block(0))
    assert _read(ahead, "0.a", "3.a") == {"0.a": 0, "3.a": 9}
    ahead.release()
    assert _read(ahead, "0.a") == {"0.a": 0}
    assert source.given.count("0.a") == 2


def test_a_block_that_is_not_wanted_any_more_is_not_fetched_to_its_end(source: Source) -> None:
    ahead = _ahead(source)
    ahead.hold(block(0), block(1))
    source.allow("0.a")
    source.wait_for("0.a")
    ahead.hold(block(2))
    source.allow(*NAMES)
    assert _read(ahead, "2.c") == {"2.c": 8}
    assert not {"0.c", *block(1)} & set(source.given)


def test_an_error_is_told_to_whoever_reads_what_it_spoiled(source: Source) -> None:
    ahead = _ahead(source)
    source.wrong = "1.b"
    source.allow(*NAMES)
    ahead.hold(block(0), block(1))
    assert _read(ahead, *block(0))
    assert _read(ahead, "1.a") == {"1.a": 3}
    for name in ("1.b", "1.c"):
        with pytest.raises(SourceError, match="it broke"):
            _read(ahead, name)
