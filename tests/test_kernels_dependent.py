"""Dependent launches: when kernels are launched so, and what products of bytes fetch meanwhile.

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

from tests.tiled import codes_of

SECTOR = of_bytes.SECTOR.value
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
    assert dependent.later_than_few(META, 4, 8) == launched | {"EARLY": True}
    assert dependent.later_than_few(META, 5, 8) == launched | {"EARLY": False}
    ask(monkeypatch, "0")
    assert dependent.later(META) == {"LATER": False}
    assert dependent.later_than_few(META, 1) == {"LATER": False, "EARLY": False}
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

    def fetch(self, ptrs: Any) -> None:
        starts = ptrs.handle.data.astype(np.int64).ravel() // SECTOR * SECTOR
        self.runs += [(int(at), int(at) + SECTOR) for at in starts]

    def of(self, tensor: torch.Tensor) -> np.ndarray:
        """How often each of its bytes was fetched."""
        begin = tensor.data_ptr()
        counts = np.zeros(tensor.nbytes, dtype=int)
        for start, stop in self.runs:
            counts[max(0, start - begin) : max(0, stop - begin)] += 1
        return counts


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    found = Fetched()
    monkeypatch.setattr(of_bytes, "_fetch", found.fetch)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(40, 256), (64, 300), (5, 130)])
def test_a_product_of_bytes_fetches_rows_that_are_there(
    rows: int, columns: int, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_bytes, "later", lambda _: {"LATER": True})
    monkeypatch.setattr(of_bytes, "_ahead", lambda _: 4)
    for name in ("wait", "release"):
        monkeypatch.setattr(of_bytes, name, lambda _: None)
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
        assert any(first - SECTOR < start <= last for first, last in ends)
