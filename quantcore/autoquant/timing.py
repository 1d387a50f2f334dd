"""What a linear of a candidate takes on this device, its weight coming from memory.

Copies of a linear take turns, as a model's layers do: by the time the first comes again no cache
has it (of 128 MiB; a CPU with a larger last level is told by `rotated_bytes`). How a turn is timed
is in stopwatches.py. On CUDA all kernels that a race needs are compiled before it, in processes of
their own (ahead.py).

Values of weights and inputs are random: they change no time.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from quantkernels.arrivals import apart
from torch import Tensor, nn

from quantcore.autoquant.ahead import compile_ahead
from quantcore.autoquant.candidates import Candidate
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.race import Contender, Effort, Stopwatch, race
from quantcore.autoquant.shapes import bytes_of, num_bytes
from quantcore.autoquant.stopwatches import Clock, Replay
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder

ROTATED_BYTES = 128 << 20
_MOST_COPIES = 1024  # a smaller weight is no layer's
_ALONE = 4  # times as much as is rotated: what is as large leaves nothing of itself behind
_STATIC_ROWS = 16  # of inputs, for static schemes to have a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Linears of one shape and profile of calls, and what each candidate costs but time."""

    rows: int
    columns: int
    dtype: str
    calls: Mapping[int, float]
    costs: Mapping[Candidate, tuple[float, ...]]  # as many figures for each

    def product(self, candidate: Candidate, tokens: int) -> Product:
        shape = {"rows": self.rows, "columns": self.columns, "dtype": self.dtype}
        return Product(candidate=candidate, tokens=tokens, **shape)  # type: ignore[arg-type]

    def products(self) -> list[Product]:
        return [self.product(of, tokens) for of in self.costs for tokens in self.calls]


class Bench:
    """A device that times. It keeps linears, and copies of them, of one shape at a time."""

    def __init__(self, device: str, rotated_bytes: int = ROTATED_BYTES) -> None:
        self.device = device
        self._rotated_bytes = rotated_bytes
        self._shape: tuple[int, int, str] | None = None
        self._copies: dict[Candidate, list[nn.Linear]] = {}
        self._pool: Any = None  # of the graphs of one shape

    def num_bytes(self, candidate: Candidate, rows: int, columns: int, dtype: str) -> int:
        """Of the weight, as it lies in memory."""
        return bytes_of(candidate, rows, columns, dtype)

    def prepare(self, products: Iterable[Product]) -> None:
        """Compile at once what stopwatches of all these will need, if that is worth anything."""
        if self.device == "cuda":
            compile_ahead(products)

    def release(self) -> None:
        """Linears and their copies go; the next product makes its own."""
        self._shape, self._pool = None, None
        self._copies.clear()

    def stopwatch(self, product: Product) -> Stopwatch:
        copies = self._made(product.candidate, product.rows, product.columns, product.dtype)
        size = num_bytes(copies[0].weight)
        wanted = -(-self._rotated_bytes // size) + 1
        fewest = 1 if size >= _ALONE * self._rotated_bytes else 2
        missing = max(fewest, min(_MOST_COPIES, wanted)) - len(copies)
        copies += [copy.deepcopy(copies[0]) for _ in range(missing)]
        x_TI = _inputs(product.tokens, product.columns, product.dtype, self.device)
        return Replay(copies, x_TI, self._pool) if self.device == "cuda" else Clock(copies, x_TI)

    def _made(self, candidate: Candidate, rows: int, columns: int, dtype: str) -> list[nn.Linear]:
        if self._shape != (rows, columns, dtype):
            self._shape = rows, columns, dtype
            self._copies.clear()
            self._pool = torch.cuda.graph_pool_handle() if self.device == "cuda" else None
        if candidate not in self._copies:
            linear = _linear(candidate, rows, columns, dtype, self.device)
            self._copies[candidate] = [linear]
        return self._copies[candidate]


def timed(
    contest: Contest, known: Mapping[Product, Timing], bench: Bench, effort: Effort
) -> dict[Product, Timing]:
    """What `known` lacks, raced. Of what is known to its end nothing runs, nor of what lost then
    and would lose now."""
    contenders, products = [], []
    for candidate, costs in contest.costs.items():
        named = {tokens: contest.product(candidate, tokens) for tokens in contest.calls}
        before = {tokens: known[of] for tokens, of in named.items() if of in known}
        watches = {tokens: _Lazy(bench, of) for tokens, of in named.items()}
        contenders.append(Contender(watches, costs, before))
        products.append(named)
    with torch.no_grad(), apart():
        found = race(contenders, contest.calls, effort.on(bench.device))
    return {
        named[tokens]: timing
        for named, timings in zip(products, found, strict=True)
        for tokens, timing in timings.items()
    }


class _Lazy:
    """A stopwatch that is made when it is first read: of what is known already none is."""

    def __init__(self, bench: Bench, product: Product) -> None:
        self._bench, self._product = bench, product
        self._watch: Stopwatch | None = None

    def __call__(self, repeats: int) -> list[float]:
        if self._watch is None:
            self._watch = self._bench.stopwatch(self._product)
        return self._watch(repeats)


def _linear(candidate: Candidate, rows: int, columns: int, dtype: str, device: str) -> nn.Linear:
    kind = getattr(torch, dtype)
    linear = nn.Linear(columns, rows, bias=False, device=device, dtype=kind)
    generator = torch.Generator(device).manual_seed(rows + columns)
    with torch.no_grad():
        linear.weight.normal_(std=0.02, generator=generator)
    linear.weight.requires_grad_(False)
    scheme = candidate.scheme
    if scheme is None:
        return linear
    whole = nn.Sequential(linear)
    recorder = None
    if scheme.static:
        recorder = Recorder(whole, moments=False)
        with recorder:
            whole(_inputs(_STATIC_ROWS, columns, dtype, device))
    layout = candidate.layout
    quantize_(whole, scheme, layout=layout, recorder=recorder, inductor_settings=False)
    return linear


def _inputs(tokens: int, columns: int, dtype: str, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(tokens)
    x_TI = torch.randn(tokens, columns, generator=generator, device=device)
    return x_TI.to(getattr(torch, dtype))
