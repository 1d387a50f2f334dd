"""Dependent launches: when kernels are launched so, and what products fetch of their weights.

What kernels do before they wait is looked at in what a compiler makes of them
(test_kernels_compile.py); that results are those of ordinary launches, on a GPU
(test_gpu_dependent.py).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from quantkernels.launches import Launch
from quantkernels.w8a8 import Weight8

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("what is fetched is seen in the interpreter", allow_module_level=True)

from quantkernels import dependent
from quantkernels.w8a8 import fused as of_bytes
from quantkernels.weight_only import fused, groups, product

from tests.test_kernels_weight_only import FORMS, codes_of, in_16_bits, inputs, weight_of

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    yield
    dependent.asked.cache_clear()


def ask(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(dependent.VARIABLE, text)
    dependent.asked.cache_clear()


def test_kernels_are_launched_so_on_hopper_alone_and_unless_it_is_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(monkeypatch, "1")
    assert dependent.later(CPU) == {"LATER": False}
    assert dependent.later(torch.device("xpu")) == {"LATER": False}
    launched = dependent.later(META)  # compiled for a GPU that is not here: Hopper
    assert launched == {"LATER": True, "launch_pdl": True}
    assert dependent.ahead(launched, 4096) * 4096 == dependent.AHEAD_BYTES
    assert dependent.later_than_few(META, 4, 8) == launched | {"EARLY": True}
    assert dependent.later_than_few(META, 5, 8) == launched | {"EARLY": False}
    ask(monkeypatch, "0")
    assert dependent.later(META) == {"LATER": False}
    assert dependent.later_than_few(META, 1) == {"LATER": False, "EARLY": False}
    assert dependent.ahead(dependent.later(META), 4096) == 0
    ask(monkeypatch, "no")
    with pytest.raises(ValueError, match="QUANTFLEET_DEPENDENT is 'no': write 0 or 1"):
        dependent.later(META)


def test_an_old_driver_could_not_capture_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "1")
    monkeypatch.setattr(dependent, "_driver", lambda: 12_020)
    dependent._able.cache_clear()
    assert dependent.later(META) == {"LATER": False}
    dependent._able.cache_clear()


class Fetched:
    """In the place of what the interpreter knows nothing of."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []  # addresses: from, to

    def fetch(self, ptr: Any, stride: Any, num_bytes: Any, count: Any) -> None:
        ptr, stride, num_bytes, count = (_number(of) for of in (ptr, stride, num_bytes, count))
        assert 0 < count <= dependent.LANES and num_bytes > 0 and num_bytes % 16 == 0
        starts = [ptr + number * stride for number in range(count)]
        self.runs += [(start, start + num_bytes) for start in starts]

    def fetch_sectors(self, ptrs: Any) -> None:
        starts = ptrs.handle.data.astype(np.int64).ravel() // dependent.SECTOR * dependent.SECTOR
        self.runs += [(int(at), int(at) + dependent.SECTOR) for at in starts]

    def of(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each of its bytes was fetched."""
        begin = tensor.data_ptr()
        counts = np.zeros(tensor.nbytes, dtype=int)
        for start, stop in self.runs:
            counts[max(0, start - begin) : max(0, stop - begin)] += 1
        return counts

    def outside(self, *tensors: torch.Tensor) -> list[tuple[int, int]]:
        ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        return [run for run in self.runs if not any(a <= run[0] and run[1] <= b for a, b in ends)]


def _number(of: Any) -> int:
    return (
        int(np.ravel(of.handle.data)[0]) if hasattr(of, "handle") else int(getattr(of, "value", of))
    )


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    found = Fetched()
    for module in (product, groups):
        monkeypatch.setattr(module, "fetch", found.fetch)
    monkeypatch.setattr(of_bytes, "fetch_sectors", found.fetch_sectors)
    return found


def steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for module in (fused, of_bytes):
        monkeypatch.setattr(module, "ahead", lambda *_: count)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("halves", [True, False], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize(
    ("rows", "split", "turn"), [(32, 1, 128), (64, 3, 128), (128, 2, 256), (256, 2, 64)]
)
def test_a_product_that_fetches_all_it_can_fetches_its_weight(
    form: Any, halves: bool, rows: int, split: int, turn: int,
    fetched: Fetched, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps(monkeypatch, 100)
    weight, _ = weight_of(*form, 250, 768)
    weight = in_16_bits(weight, torch.bfloat16) if halves else weight
    launch = Launch(rows=rows, tokens=16, split=split, turn=turn, stages=2, warps=4)
    y_TO = fused.linear(inputs(1, 768, torch.float16), weight, None, launch)
    read = [weight.codes_RPBW, weight.scale, *([] if weight.zero is None else [weight.zero])]
    assert not fetched.outside(*read)
    assert (fetched.of(weight.codes_RPBW) == 1).all()
    assert all((fetched.of(tensor) > 0).all() for tensor in read)
    monkeypatch.undo()
    assert torch.equal(y_TO, fused.linear(inputs(1, 768, torch.float16), weight, None, launch))


@pytest.mark.parametrize("halves", [True, False], ids=["16 bits", "32 bits"])
def test_a_product_fetches_what_it_reads_first(
    halves: bool, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(monkeypatch, 1)
    weight, _ = weight_of("int4", 128, "affine", False, 256, 1280)
    weight = in_16_bits(weight, torch.float16) if halves else weight
    launch = Launch(rows=64, tokens=16, split=3, turn=128, stages=2, warps=4)
    fused.linear(inputs(1, 1280, torch.float16), weight, None, launch)
    assert not fetched.outside(weight.codes_RPBW, weight.scale)
    pieces = fetched.of(weight.codes_RPBW).reshape(2, 10, -1).mean(axis=2)
    assert pieces.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0, 0]] * 2  # turns 0, 3 and 6 begin spans
    of_scales = fetched.of(weight.scale).reshape(2, 5 if halves else 10, -1).max(axis=2) > 0
    first = [True, True, False, True, False] if halves else pieces[0].astype(bool).tolist()
    assert of_scales.tolist() == [first] * 2


@pytest.mark.parametrize(("rows", "columns"), [(40, 256), (64, 300), (5, 130)])
def test_a_product_of_bytes_fetches_rows_that_are_there(
    rows: int, columns: int, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(monkeypatch, 4)
    wide = torch.zeros(rows + 1, columns + 32, dtype=torch.int8)
    codes_OI = wide[:rows, :columns].copy_(codes_of("int8", rows, columns))
    scale_O = torch.full((rows,), 2.0**-10)
    weight = Weight8(codes_OI=codes_OI, scale_O=scale_O, kind="int8", features=(rows, columns))
    launch = Launch(rows=32, tokens=16, split=2, turn=128, stages=2, warps=4)
    x_TI = codes_of("int8", 3, columns)
    of_bytes.linear(x_TI, torch.ones(3), weight, None, torch.float16, launch)
    there = np.zeros((rows + 1, columns + 32), dtype=bool)
    there[:rows, :columns] = True
    counts = fetched.of(wide).reshape(there.shape)
    assert (counts[there] > 0).all()
    begin, end = wide.data_ptr(), codes_OI[-1, -1:].data_ptr()
    assert (fetched.of(scale_O) > 0).all()
    ends = (begin, end), (scale_O.data_ptr(), scale_O[-1:].data_ptr())
    for start, _ in fetched.runs:
        assert any(first - dependent.SECTOR < start <= last for first, last in ends)
