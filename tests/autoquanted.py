"""A small model, and a bench of made-up times, for tests of autoquant in one process."""

from typing import Any

import torch
from torch import Tensor, nn

from quantcore.autoquant import Autoquant, autoquant
from quantcore.autoquant.measurements import HardwareKind, Product
from quantcore.autoquant.race import Stopwatch
from quantcore.autoquant.timing import Bench
from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor

WIDTH, WORDS = 32, 40
HERE = HardwareKind(device="cpu", name="Made up", torch="2.13.0", kernels="a:1")
SCHEMES = (Scheme(name="int8"), Scheme(name="int4", group_size=32))
INT4_WINS = {"dense": 20.0, "int8": 10.0, "int4": 5.0}
INT8_WINS = {"dense": 10.0, "int8": 5.0, "int8_dynamic": 20.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x)
        out: Tensor = x + self.o_proj(mixed)
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.words(ids)))
        return logits


class MadeUp(Bench):
    """Microseconds by scheme, others' 1000; and what was asked for."""

    def __init__(self, **us: float) -> None:
        super().__init__("cpu")
        self.us = us
        self.asked: list[Product] = []

    def stopwatch(self, product: Product) -> Stopwatch:
        self.asked.append(product)
        name = product.candidate.scheme.name if product.candidate.scheme else "dense"
        us = self.us.get(name, 1000.0) * product.rows * product.tokens
        return lambda repeats: [us] * repeats


def model() -> Model:
    return Model().to(torch.bfloat16).eval()


def ids(seed: int = 0, tokens: int = 24) -> Tensor:
    return torch.randint(0, WORDS, (2, tokens), generator=torch.Generator().manual_seed(seed))


def planned(on: nn.Module, *calls: Tensor, **options: Any) -> Autoquant:
    options = {"bench": MadeUp(**INT8_WINS), "hardware": HERE, **options}
    auto = autoquant(on, calls=None, **options)
    with torch.no_grad():
        for call in calls or (ids(),):
            on(call)
    auto.finalize()
    return auto


def labels(on: nn.Module) -> dict[str, str]:
    return {
        name: str(module.weight.scheme.name)
        if isinstance(module.weight, QuantizedTensor)
        else "dense"
        for name, module in on.named_modules()
        if isinstance(module, nn.Linear)
    }
