"""Hidden states that wait on the host or on disk while a GPU computes. Run with: pytest -m gpu"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import workers.transfers
from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from workers.shelf import Shelf, places

pytestmark = pytest.mark.gpu

_PLACES = places("cuda")


def _long(hidden_BLH: Tensor, w_HH: Tensor) -> Tensor:
    """What takes far longer to compute than to be asked for."""
    for _ in range(20):
        hidden_BLH = torch.tanh(hidden_BLH @ w_HH)
    return hidden_BLH


def _passes(shelf: Shelf, states: list[Tensor], w_HH: Tensor, count: int = 4) -> list[Tensor]:
    """States through a few blocks, each pass's outputs in the place of its inputs."""
    for _ in range(count):
        following = [*states[1:], None]
        states = [
            shelf.put(_long(shelf.get(kept, later), w_HH))
            for kept, later in zip(states, following, strict=True)
        ]
    shelf.settle()
    return states


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("piece", [32 << 20, 1 << 20, 12_344])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_waits_elsewhere_comes_back_to_the_bit(
    place: str, piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies run beside what computes; none may read or write what the other still needs."""
    monkeypatch.setattr(workers.transfers, "PIECE_BYTES", piece)
    torch.manual_seed(0)
    w_HH = torch.randn(1024, 1024, device="cuda", dtype=dtype) / 32
    first = [torch.randn(2, 700, 1024, device="cuda", dtype=dtype) for _ in range(9)]
    wanted = first
    for _ in range(4):
        wanted = [_long(hidden_BLH, w_HH) for hidden_BLH in wanted]
    shelf = Shelf(torch.device("cuda"), place)
    found = _passes(shelf, [shelf.put(hidden_BLH) for hidden_BLH in first], w_HH)
    assert all(state.device.type == ("cuda" if place == "device" else "cpu") for state in found)
    for state, expected in zip(found, wanted, strict=True):
        assert torch.equal(state.cuda(), expected)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_pass_holds_few_micro_batches_on_the_device_however_many_there_are(place: str) -> None:
    """Two that come, three that go, and what a forward itself makes of one."""
    w_HH = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) / 45
    shape = (8, 512, 2048)
    shelf = Shelf(torch.device("cuda"), place)
    states = [shelf.put(torch.randn(shape, device="cuda").bfloat16()) for _ in range(24)]
    shelf.settle()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _passes(shelf, states, w_HH, count=1)
    one = states[0].nbytes
    assert torch.cuda.max_memory_allocated() - before <= (2 + 3 + 3) * one


def test_what_was_fetched_in_vain_spoils_nothing() -> None:
    shelf = Shelf(torch.device("cuda"), "host")
    states = [shelf.put(torch.full((1 << 22,), float(n), device="cuda")) for n in range(8)]
    shelf.settle()
    for number in range(8):
        other = states[(number + 3) % 8]
        there = shelf.get(states[number], other)  # which is not what is asked for next
        again = torch.full((1 << 22,), -1.0, device="cuda")
        assert torch.equal(there, torch.full_like(there, number))
        assert bool((again == -1).all())


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_gives_the_same_bytes_wherever_its_states_wait(
    job_file: Callable[..., Path], text_file: Path, place: str, dtype: str
) -> None:
    """Sequences enough for several micro-batches in a chunk."""
    calibration = {"text": str(text_file), "sequences": 40, "length": 32}
    written = []
    for name in ("device", place):
        prepared = check(job_file(name, compute_dtype=dtype, calibration=calibration))
        assert prepared.device == "cuda"
        plan = dataclasses.replace(prepared.plan, states_on=name)
        prepared = dataclasses.replace(prepared, plan=plan)
        result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cuda"]), Observer())
        model = Path(result.store) / "model"
        written.append({file.name: file.read_bytes() for file in model.iterdir()})
    assert written[0] == written[1]


def test_a_worker_that_runs_short_moves_its_states_whole() -> None:
    shelf = Shelf(torch.device("cuda"))
    torch.manual_seed(0)
    states = [torch.randn(3, 1000, 1111, device="cuda") for _ in range(12)]
    expected = [state.cpu() for state in states]
    kept = [shelf.put(state) for state in states]
    for place in ("host", "disk"):
        assert shelf.lower()
        kept = [shelf.put(state) for state in kept]
        shelf.settle()
        assert shelf.place == place
        assert all(map(torch.equal, kept, expected))
