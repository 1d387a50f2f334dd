"""Launches on the device that the tensors are on, where another one is current."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantkernels import devices
from quantkernels.devices import on_its_device
from quantkernels.forward import rms_norm, rotated, silu_product
from quantkernels.gram import gram, gram_of_finite
from quantkernels.ranges import AffineRange, search
from quantkernels.rounding import InputGrid, by_scale, by_tensor, by_token
from quantkernels.weight_only import dense, linear, pack
from torch import Tensor

from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor, w8a8
from tests.quantized import linear as quantized
from tests.tiled import weight_of


@dataclass
class Placed:
    device: torch.device


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_device_of_the_first_argument_is_current_within(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(str(device))
        yield
        entered.append("left")

    stand_in = SimpleNamespace(current_device=lambda: 0, device=current)
    monkeypatch.setattr(devices, "torch", SimpleNamespace(**{kind: stand_in}))
    run = on_its_device(lambda first, more: entered.append("run") or more)
    assert run(Placed(torch.device(kind, 1)), 5) == 5
    assert entered == [f"{kind}:1", "run", "left"]
    run(Placed(torch.device(kind, 0)), 5)
    run(Placed(torch.device("cpu")), 5)
    assert entered[3:] == ["run", "run"]


@pytest.mark.parametrize(
    ("of", "dtypes"),
    [((8, 0), [torch.float16]), ((9, 0), [torch.float16, torch.bfloat16])],
)
def test_ptx_for_pairs_of_bfloat16_is_hoppers(
    of: tuple[int, int], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = pytest.importorskip("quantkernels.weight_only.fused")
    monkeypatch.setattr(fused, "capability", lambda _: of)
    weight, _ = weight_of("int4", 128, "affine", False, 8, 128)
    for dtype in (torch.float16, torch.bfloat16):
        for device in ("cuda:0", "meta"):
            told = fused._codes(weight, dtype, torch.device(device), scaled=False)
            assert bool(told["PTX"]) == (dtype in dtypes)


def test_a_gpu_without_float8_multiplies_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = QuantizedTensor.of(quantized(Scheme(name="float8_dynamic"), 32, 64), torch.bfloat16)
    x_TI: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    for of, takes in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(w8a8, "capability", lambda _, of=of: of)
        assert w8a8.takes(x_TI, weight) == takes


GRID = InputGrid("affine", -128, 127)
AFFINE = AffineRange(qmin=-8, qmax=7, zero_point="int", stored=torch.bfloat16)
New = Callable[..., Tensor]
CALLS: dict[str, Callable[[New], object]] = {
    "rms_norm": lambda new: rms_norm(new(5, 64), new(64), 1e-5, "scale"),
    "rotated": lambda new: rotated(new(1, 2, 3, 8), new(1, 3, 8), new(1, 3, 8)),
    "silu_product": lambda new: silu_product(new(5, 64), new(5, 64)),
    "gram": lambda new: gram(new(5, 64), new(64, 64).float()).tril(),
    "gram_of_finite": lambda new: gram_of_finite(new(5, 64), new(64, 64).float()),
    "by_token": lambda new: by_token(new(5, 64), GRID),
    "by_tensor": lambda new: by_tensor(new(5, 64), GRID),
    "by_scale": lambda new: by_scale(new(5, 64), new(1).abs(), GRID),
    "search": lambda new: search(
        new(5, 2, 32).float(), new(2, 32).float().abs(), AFFINE, torch.ones_like(new(3).float())
    ),
    "pack": lambda new: pack(new(5, 64).to(torch.int8), "int8"),
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_another_gpu_than_the_current_one_gives_the_same(name: str) -> None:
    def on(device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

        found = CALLS[name](new)
        return list(found) if isinstance(found, tuple) else [found]  # type: ignore[list-item]

    for here, there in zip(on("cuda:0"), on("cuda:1"), strict=True):
        assert there.device.index == 1
        assert torch.equal(here.cpu(), there.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_a_product_on_another_gpu_than_the_current_one(tokens: int) -> None:
    weight, w_OI = weight_of("int4", 128, "affine", False, 512, 4096)
    moved = {name: getattr(weight, name).to("cuda:1") for name in ("codes_RPBW", "scale")}
    there = replace(weight, **moved)
    x_TI = torch.randn(tokens, 4096, device="cuda:1", dtype=torch.bfloat16)
    wanted_TO = x_TI.double().cpu() @ torch.from_numpy(w_OI).t()
    y_TO = linear(x_TI, there).double().cpu()
    assert (y_TO - wanted_TO).norm() < 4e-3 * wanted_TO.norm()
    w_OI_there = dense(there, torch.bfloat16).double().cpu()
    assert torch.allclose(w_OI_there, torch.from_numpy(w_OI), rtol=8e-3, atol=0)
