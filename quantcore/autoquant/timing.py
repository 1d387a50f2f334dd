"""What a linear of a candidate takes on this device, its weight coming from memory.

Copies of a linear take turns, as a model's layers do: by the time the first comes again no cache
has it (of 128 MiB; a CPU with a larger last level is told by `rotated_bytes`). On CUDA the calls
are captured into a graph, and a time is a replay's over its calls, as a search for launches has it
(quantkernels/tune/timing.py). Elsewhere it is by the clock, that of the calls which fill a slice of
two milliseconds: with all that torch and Python add to a call, as an eager model has it too.

Values of weights and inputs are random: they change no time.
"""

import copy
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from quantkernels.weight_only.arrivals import forget
from torch import Tensor, nn

from quantcore.autoquant.candidates import Candidate
from quantcore.autoquant.measurements import Product, Timing
from quantcore.autoquant.race import Contender, Effort, Stopwatch, race
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder
from quantcore.tensors import QuantizedTensor

ROTATED_BYTES = 128 << 20
_MOST_COPIES = 1024  # a smaller weight is no layer's
_SLICE_S = 2e-3  # a clock's own time does not show in as much
_REPLAY_US = 250.0  # nor does a graph's beginning and end
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


class Bench:
    """A device that times. It keeps linears, and copies of them, of one shape at a time."""

    def __init__(self, device: str, rotated_bytes: int = ROTATED_BYTES) -> None:
        self.device = device
        self._rotated_bytes = rotated_bytes
        self._shape: tuple[int, int, str] | None = None
        self._copies: dict[Candidate, list[nn.Linear]] = {}

    def num_bytes(self, candidate: Candidate, rows: int, columns: int, dtype: str) -> int:
        """Of the weight, as it lies in memory."""
        return _num_bytes(self._made(candidate, rows, columns, dtype)[0])

    def stopwatch(self, product: Product) -> Stopwatch:
        copies = self._made(product.candidate, product.rows, product.columns, product.dtype)
        wanted = -(-self._rotated_bytes // _num_bytes(copies[0])) + 1
        missing = max(2, min(_MOST_COPIES, wanted)) - len(copies)
        copies += [copy.deepcopy(copies[0]) for _ in range(missing)]
        x_TI = _inputs(product.tokens, product.columns, product.dtype, self.device)
        return (_Replay if self.device == "cuda" else _Clock)(copies, x_TI)

    def _made(self, candidate: Candidate, rows: int, columns: int, dtype: str) -> list[nn.Linear]:
        if self._shape != (rows, columns, dtype):
            self._shape = rows, columns, dtype
            self._copies.clear()
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
    try:
        with torch.no_grad():
            found = race(contenders, contest.calls, effort)
    finally:
        if bench.device == "cuda":
            forget()  # no graph of this race is replayed again
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


class _Clock:
    def __init__(self, linears: list[nn.Linear], x_TI: Tensor) -> None:
        self._turns = itertools.cycle(linears)
        self._x_TI = x_TI
        self._calls = 1
        self._slice()  # the first pays for what is made once
        self._calls = max(1, round(_SLICE_S * 1e6 / self._slice()))

    def __call__(self, repeats: int) -> list[float]:
        next(self._turns)(self._x_TI)  # after others' turn
        return [self._slice() for _ in range(repeats)]

    def _slice(self) -> float:
        linears = list(itertools.islice(self._turns, self._calls))
        start = time.perf_counter()
        for linear in linears:
            linear(self._x_TI)
        return (time.perf_counter() - start) * 1e6 / self._calls


class _Replay:
    def __init__(self, linears: list[nn.Linear], x_TI: Tensor) -> None:
        for linear in linears[:2]:  # nothing is compiled or searched for from here on
            linear(x_TI)
        torch.cuda.synchronize()
        self._linears, self._x_TI = linears, x_TI
        self._calls = len(linears)
        self._graph = self._captured(rounds=1)
        self._graph.replay()
        if (rounds := int(_REPLAY_US / (self._replay() * self._calls)) + 1) > 1:
            self._calls *= rounds
            self._graph = self._captured(rounds)

    def __call__(self, repeats: int) -> list[float]:
        self._graph.replay()
        return [self._replay() for _ in range(repeats)]

    def _captured(self, rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for linear in self._linears * rounds:
                linear(self._x_TI)
        return graph

    def _replay(self) -> float:
        start, end = (_event(), _event())
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self._calls


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


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


def _num_bytes(linear: nn.Linear) -> int:
    weight = linear.weight
    return weight.num_bytes() if isinstance(weight, QuantizedTensor) else weight.nbytes
