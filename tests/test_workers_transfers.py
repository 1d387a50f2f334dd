"""Hidden states on their way to and from an accelerator: the CPU plays one, without streams."""

from typing import Any

import pytest
import torch
from torch import Tensor

import workers.transfers
from workers.shelf import Shelf
from workers.transfers import Transfers


class Stream:
    """Does everything at once."""

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self) -> "Event":
        return Event()


class Event:
    def __init__(self, *_: Any) -> None: ...
    def wait(self, stream: Any) -> None: ...
    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(workers.transfers, "PIECE_BYTES", 100)
    monkeypatch.setattr(workers.transfers, "_current", Stream)
    monkeypatch.setattr(
        workers.transfers, "_pinned", lambda n: torch.full((n,), 255, dtype=torch.uint8)
    )
    return Transfers(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 24, 25, 26, 50, 51, 1000])
def test_whole_and_broken_pieces_arrive_as_they_were(
    transfers: Transfers, dtype: torch.dtype, count: int
) -> None:
    sent = [torch.randn(1, count, 3).to(dtype) for _ in range(6)]
    kept = [torch.full_like(tensor, float("nan")) for tensor in sent]
    for tensor, room in zip(sent, kept, strict=True):
        transfers.send(tensor, room)
    back = [transfers.fetch(room) for room in kept]  # also of what is still being sent
    for tensor, coming in zip(sent, back, strict=True):
        assert torch.equal(coming.wait(), tensor)
    transfers.settle()
    assert all(map(torch.equal, kept, sent))


def test_what_does_not_lie_in_one_piece_is_sent_as_well(transfers: Transfers) -> None:
    sent = torch.randn(1, 40, 30).transpose(1, 2)
    kept = torch.empty(sent.shape)
    transfers.send(sent, kept)
    transfers.settle()
    assert torch.equal(kept, sent)


def test_an_error_on_the_way_is_told(transfers: Transfers) -> None:
    transfers.send(torch.ones(4, 9), torch.empty(1, 9))
    with pytest.raises(ValueError, match="zip"):
        transfers.settle()


class Fetches:
    """What a shelf asks for, and what it lets go of without having waited."""

    def __init__(self) -> None:
        self.begun: list[Tensor] = []
        self.waited: list[Tensor] = []

    def fetch(self, kept: Tensor) -> Any:
        self.begun.append(kept)
        fetches = self

        class Coming:
            def __init__(self) -> None:
                self.kept = kept

            def wait(self) -> Tensor:
                fetches.waited.append(kept)
                return kept.clone()

        return Coming()

    def settle(self) -> None: ...


def test_a_shelf_fetches_what_is_wanted_next_and_waits_for_what_is_not() -> None:
    shelf, fetches = Shelf(torch.device("cuda"), "host"), Fetches()
    shelf.__dict__["_transfers"] = fetches
    first, second, third = (torch.full((2,), float(n)) for n in range(3))
    assert torch.equal(shelf.get(first, second), first)
    assert [t is u for t, u in zip(fetches.begun, [first, second], strict=True)] == [True] * 2
    assert torch.equal(shelf.get(second, third), second)
    assert len(fetches.begun) == 3, "the second was on its way already"
    assert torch.equal(shelf.get(first), first)
    assert len(fetches.begun) == 4
    assert any(tensor is third for tensor in fetches.waited)
    shelf.get(first, second)
    shelf.settle()
    assert len(fetches.waited) == len(fetches.begun)
