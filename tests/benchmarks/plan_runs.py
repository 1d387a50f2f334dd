"""A model that is planned for and run under plans, one after another, and is dense in between."""

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantcore.autoquant import autoquant
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.divergence import undone
from quantcore.autoquant.document import Plan
from quantcore.autoquant.finalists import Prepare
from quantcore.autoquant.findings import Findings
from quantcore.autoquant.measurements import HardwareKind, Measurements, Product
from quantcore.autoquant.options import Profile
from quantcore.autoquant.race import Effort, Stopwatch
from quantcore.autoquant.swapping import swap
from quantcore.autoquant.timing import Bench
from quantcore.joining import join_linears
from quantcore.quantize import linears_of
from quantcore.recorder import Recorder
from tests.benchmarks.decode import linear_bytes
from workers.decoding import call

FREE = Budgets()


class Careful(Bench):
    """A candidate that fails is named and loses, so that the others are told."""

    def stopwatch(self, product: Product) -> Stopwatch:
        try:
            return super().stopwatch(product)
        except Exception as error:  # whatever it is
            shape = f"{product.rows}x{product.columns}, {product.tokens} tokens"
            print(f"FAILED: {product.candidate.label()}, {shape}: {error!r}"[:400], flush=True)
            return lambda repeats: [1e9] * repeats


@dataclass(slots=True)
class Run:
    """One model, dense whenever nothing is done with it, and all that is known of it."""

    model: nn.Module
    options: argparse.Namespace
    hardware: HardwareKind
    recorded_BT: Tensor
    held_out_BT: Tensor
    begun_s: float
    measurements: Measurements = field(default_factory=lambda: Measurements(of={}))
    findings: Findings = field(default_factory=Findings)
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    recorder: Recorder | None = None  # for static schemes

    def __post_init__(self) -> None:
        self.linears = linears_of(self.model, None)
        watched = self.linears.keys()
        self.recorder = Recorder(self.model, lambda name, _: name in watched, moments=False)
        with self.recorder:
            self.model(self.recorded_BT, use_cache=False, logits_to_keep=1)

    def planned(
        self, profile: Profile, budgets: Budgets = FREE, run: Prepare | None = None
    ) -> tuple[Plan, float, float]:
        """The plan, and the seconds from the recorded call until it is chosen, and swapped."""
        options = self.options
        with undone(self.model, self.linears):
            auto = autoquant(
                self.model,
                options.candidates,
                profile=profile,
                budgets=budgets,
                held_out=[self.held_out_BT],
                calls=None,
                join=True,
                run=run,
                measurements=self.measurements,
                findings=self.findings,
                hardware=self.hardware,
                bench=Careful(options.device),
                effort=Effort(seconds=options.seconds),
            )
            self.model(self.recorded_BT, use_cache=False, logits_to_keep=1)
            _wait()
            start = time.perf_counter()
            plan = auto.finalize()
            _wait()
            seconds = time.perf_counter() - start
        self.measurements, self.findings = auto.measurements, auto.findings
        for warning in auto.warnings:
            print(f"    {warning}", flush=True)
        _tidy()
        return plan, auto.chosen_s, seconds

    def late(self) -> bool:
        return time.perf_counter() - self.begun_s > self.options.deadline

    def timed(self, labels: dict[str, str], profiles: Iterable[Profile]) -> dict[str, list[float]]:
        """Milliseconds of each profile under a plan, by linear; and its bytes."""
        with undone(self.model, self.linears):
            swap(self.model, labels, self.recorder)
            join_linears(self.model)
            found = {}
            for profile in profiles:
                run = runner(profile, self.options)(self.model)
                found[profile.name] = [_ms(run) for _ in range(self.options.repeats + 1)][1:]
                del run
            head = self.model.get_output_embeddings().weight.nbytes  # type: ignore[operator]
            found["bytes"] = [linear_bytes(self.model) - head]
        _tidy()
        return found


def runner(profile: Profile, options: argparse.Namespace) -> Prepare:
    """All calls of a profile, once."""

    def prepared(model: nn.Module) -> Callable[[], object]:
        parts = [
            (call(model, tokens, options.cache), round(n)) for tokens, n in profile.calls.items()
        ]
        return lambda: [one() for one, times in parts for _ in range(times)]

    return prepared


def _ms(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
