"""Memory that other processes may read: what is cut out of it, kept in it, and read of it."""

import multiprocessing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.arena import Arena, Region
from workers.kept import Kept, Mapped, Near, regions_of
from workers.parcels import mapped

CPU = torch.device("cpu")


def _part(device: str = "cpu") -> dict[str, Any]:
    part = {
        "sum": torch.randn(5, 7),
        "rows": (torch.arange(4.0).half(), 3),
        "turned": torch.randn(6, 2).T,
        "codes": torch.arange(9, dtype=torch.int8),
        "nothing": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    moved: dict[str, Any] = mapped(part, torch.Tensor, lambda tensor: tensor.to(device))
    return moved


def _assert_same(one: Any, other: Any) -> None:
    assert one["rows"][1] == other["rows"][1]
    torch.testing.assert_close(one["rows"][0], other["rows"][0], rtol=0, atol=0)
    for name in ("sum", "turned", "codes", "nothing", "one"):
        torch.testing.assert_close(one[name].cpu(), other[name].cpu(), rtol=0, atol=0)


def test_what_is_kept_is_what_was_given() -> None:
    kept, part = Kept(CPU), _part()
    kept.keep("a", (part, _part()))
    _assert_same(kept.part("a", 0), part)
    assert kept.part("b", 0) is None
    kept.drop("a")
    kept.drop("a")
    assert kept.part("a", 0) is None


def test_what_was_read_outlives_what_was_kept() -> None:
    kept, part = Kept(CPU), _part()
    kept.keep("a", (part,))
    read = kept.part("a", 0)
    kept.drop("a")
    kept.keep("b", ({"other": torch.full((1000,), 7.0)},))
    _assert_same(read, part)


def test_what_finds_no_room_is_kept_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, part = Kept(CPU), _part()
    place, left = Arena.place, [3]

    def no_room(arena: Arena, tensor: torch.Tensor) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return place(arena, tensor)

    monkeypatch.setattr(Arena, "place", no_room)
    assert kept.keep("a", (part,)) is None
    assert kept._arena._free == [Region(0, 0, 2**28)], "what was placed first came free again"
    _assert_same(kept.part("a", 0), part)
    assert kept.packed("a", 0)["sum"].tolist() == part["sum"].tolist()
    kept.drop("a")


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), min_size=1, max_size=40))
def test_no_two_regions_share_a_byte_and_all_come_free(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(CPU, slab_bytes=4096)
    held: list[tuple[Any, int]] = []
    for number, (free, size) in enumerate(steps):
        if free and held:
            placed, _ = held.pop(size % len(held))
            arena.free([placed.region])
        placed = arena.place(torch.full((size,), number % 256, dtype=torch.uint8))
        held.append((placed, number % 256))
        for other, value in held:
            assert bool((arena.at(other) == value).all())
    slabs = {placed.region.slab for placed, _ in held}
    arena.free([placed.region for placed, _ in held])
    free = sorted({region.slab: region for region in arena._free}.values())
    assert len(free) == len(arena._free), "pieces that meet were not put together"
    assert all(region.offset == 0 for region in free) and slabs <= {r.slab for r in free}


def test_a_freed_region_is_used_again() -> None:
    arena = Arena(CPU, slab_bytes=1024)
    first = arena.place(torch.ones(100))
    arena.free([first.region])
    assert arena.place(torch.ones(50)).region == Region(0, 0, 256)
    assert arena.place(torch.ones(1000)).region.slab == 1, "larger than a slab: one of its own"


def _lender(to: Any, back: Any) -> None:
    kept = Kept(torch.device("cuda"))
    torch.manual_seed(0)
    for name in ("before", "read"):
        placed = kept.keep(name, (torch.randn(1000, 30, device="cuda"), _part("cuda")))
    torch.cuda.synchronize()
    slabs = {region.slab for region in regions_of(placed)}
    to.send((placed, {slab: kept.lend(slab) for slab in slabs}))
    to.send([part.cpu() for part in (kept.part("read", 0), kept.part("read", 1)["sum"])])
    back.recv()
    kept.drop("before")
    again = kept.keep("again", (torch.full((1000, 30), 7.0, device="cuda"),))
    torch.cuda.synchronize()
    to.send(again)
    back.recv()


@pytest.mark.gpu
def test_another_process_reads_what_is_kept_and_needs_no_new_mapping() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    answers, questions = context.Pipe()
    process = context.Process(target=_lender, args=(theirs, answers))
    process.start()
    try:
        placed, slabs = ours.recv()
        near = Mapped()
        for slab, told in slabs.items():
            near.add(3, slab, told)
        wanted = ours.recv()
        parts = [near.part(Near(3, part, {})) for part in placed]
        torch.testing.assert_close(parts[0].cpu(), wanted[0], rtol=0, atol=0)
        torch.testing.assert_close(parts[1]["sum"].cpu(), wanted[1], rtol=0, atol=0)
        questions.send(None)
        (again,) = ours.recv()
        there = near.part(Near(3, again, {}))
        assert bool((there == 7.0).all()), "put where something else was dropped"
        near.forget(3)
        questions.send(None)
    finally:
        process.join(60)
    assert process.exitcode == 0
