"""Plans on a CPU: what was predicted beside what was measured, end to end, of a real model.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.autoquant_cpu \
        --model FOLDER --text FILE --held-out FILE

A plan is made for decode (one token a call), for prefill, and for a mix of both, with errors in
nats a token, scaled by whole-model checks: by predictions alone, then from what was measured and
found with a few plans run end to end (finalists.py), without a budget of error and with one between
two uniform schemes (`--between`). Then, in turns within one run, each plan, the dense model and
every uniform plan are timed end to end: a step of one token after a prompt out of a static cache,
and a prompt.

    predicted   the sum of the plan's linears, and the rest of the model: what the dense model took
                end to end, less what its linears were timed at; none for a uniform plan that lost
                its races, and so was not timed to the end
    measured    medians over rounds; models take turns in each

Schemes are symmetric ones: SmolLM2's weights were once rounded with a float zero point in groups
of 32, and that scheme would beat all others. Linears of one input are joined, the dense model's
too; the output head stays dense. Eager: torch's and Python's own time is in both figures. Both
cores must be free.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.autoquant import autoquant
from quantcore.autoquant.candidates import DENSE_LABEL, candidate_of, refused, schemes_of
from quantcore.autoquant.choice import Budgets, Totals
from quantcore.autoquant.document import Plan
from quantcore.autoquant.findings import Findings
from quantcore.autoquant.measurements import HardwareKind, Measurements
from quantcore.autoquant.options import Profile
from quantcore.autoquant.race import Effort
from quantcore.joining import join_linears, joinable
from quantcore.quantize import linears_of, quantize_
from quantcore.schemes import Scheme
from tests.benchmarks.decode import linear_bytes
from tests.benchmarks.plan_runs import runner
from workers.decoding import Decoder
from workers.kind import hardware_kind
from workers.loading import load


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    profile: str
    plan: str
    predicted_ms: float | None
    measured_ms: float
    low_ms: float
    high_ms: float
    linear_bytes: int
    error: float  # nats a token, predicted


def tokens_of(folder: Path, text: Path, start: int, count: int) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text()[: (start + count) * 8], verbose=False)["input_ids"]
    return torch.tensor(ids[start : start + count])[None]


class Runner:
    """One model, as a plan leaves it: milliseconds of a decode step and of a prompt."""

    linear_bytes: int

    def __init__(self, model: nn.Module, prompt_BT: Tensor, steps: int) -> None:
        self._model, self._prompt_BT, self._steps = model, prompt_BT, steps
        length = prompt_BT.shape[1] + steps + 1
        self._decoder = Decoder(model, 1, length)
        self.linear_bytes = linear_bytes(model) - model.get_output_embeddings().weight.nbytes

    def decode_ms(self) -> list[float]:
        self._decoder.begin(self._prompt_BT[:, :16])
        return [_ms(self._decoder.step) for _ in range(self._steps)]

    def prefill_ms(self) -> list[float]:
        return [_ms(lambda: self._model(self._prompt_BT, logits_to_keep=1))]


def _ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


@dataclass(slots=True, kw_only=True)
class Planner:
    """Plans of one model, each with what is known from those before."""

    make: Callable[[], nn.Module]
    schemes: list[Scheme]
    recorded: Tensor
    held_out: list[Tensor]
    hardware: HardwareKind
    effort: Effort
    measurements: Measurements = field(default_factory=lambda: Measurements(of={}))
    findings: Findings = field(default_factory=Findings)

    def plan(self, name: str, profile: Profile, **more: Any) -> Plan:
        model = self.make()
        auto = autoquant(
            model,
            self.schemes,
            profile=profile,
            held_out=self.held_out,
            calls=None,
            join=True,
            measurements=self.measurements,
            findings=self.findings,
            hardware=self.hardware,
            effort=self.effort,
            **more,
        )
        model(self.recorded)
        start = time.perf_counter()
        plan = auto.finalize()
        print(f"{name}: planned in {time.perf_counter() - start:.1f} s", flush=True)
        self.measurements, self.findings = auto.measurements, auto.findings
        for line in (*map(str, plan.checks[-1:]), *map(str, plan.ends), *auto.warnings):
            print(f"    {line}", flush=True)
        if plan.factors:
            print(f"    kernels' times scaled: {plan.factors}", flush=True)
        return plan


def swap(model: nn.Module, labels: dict[str, str]) -> None:
    """By linear, what it becomes."""
    for label in set(labels.values()) - {DENSE_LABEL}:
        candidate = candidate_of(label)
        assert candidate.scheme is not None
        quantize_(
            model,
            candidate.scheme,
            lambda name, _, label=label: labels.get(name) == label,
            layout=candidate.layout,
            inductor_settings=False,
        )
    join_linears(model)


def uniform(model: nn.Module, label: str) -> dict[str, str]:
    """This candidate where it is legal, dense elsewhere: those that are joined take one."""
    candidate, linears = candidate_of(label), linears_of(model, None)
    groups = {name: names for names in joinable(model) for name in names}
    return {
        name: label
        for name in linears
        if not any(
            refused(
                candidate, (linears[of].out_features, linears[of].in_features), "bfloat16", "cpu"
            )
            for of in groups.get(name, (name,))
        )
    }


def end_to_end(runners: dict[str, Runner], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By runner and kind of call: medians of each round, the first left out. They take turns."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "prefill": []} for name in runners
    }
    for number in range(rounds + 1):
        for name, one in runners.items():
            found = {"decode": one.decode_ms(), "prefill": one.prefill_ms()}
            if number:
                for kind, of in found.items():
                    times[name][kind].append(statistics.median(of))
    return times


def mixed(times: dict[str, list[float]], profile: Profile, prompt: int) -> list[float]:
    calls = {"decode": profile.calls.get(1, 0), "prefill": profile.calls.get(prompt, 0)}
    return [
        calls["decode"] * decode + calls["prefill"] * prefill
        for decode, prefill in zip(times["decode"], times["prefill"], strict=True)
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="recorded")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--between", nargs=2, default=("int8 sym channel", "int4 sym g64"), help="schemes"
    )
    parser.add_argument("--candidates", nargs="+", default=("default", "int4"))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each product")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompt = options.prompt
    profiles = [
        Profile(name="decode_1", calls={1: 1}),
        Profile(name=f"prefill_{prompt}", calls={prompt: 1}),
        Profile(name="mix", calls={1: 64, prompt: 1}),
    ]
    recorded = tokens_of(options.model, options.text, 0, 512)
    held_out = [tokens_of(options.model, options.held_out, 4096, 512)]
    kind = hardware_kind("cpu")
    hardware = HardwareKind.of(kind, threads=torch.get_num_threads())
    make = lambda: load(options.model, torch.bfloat16)  # noqa: E731
    planner = Planner(
        make=make,
        schemes=[of for of in schemes_of(options.candidates) if of.symmetric],
        recorded=recorded,
        held_out=held_out,
        hardware=hardware,
        effort=Effort(seconds=options.seconds),
    )
    length = argparse.Namespace(cache=prompt)
    rows: dict[str, dict[str, Totals]] = {}
    takes: dict[str, dict[str, str]] = {}
    for profile in profiles:
        plain = planner.plan(f"{profile.name}, by prediction", profile)
        moved = {check.plan: check.measured for check in plain.checks}
        budget = statistics.mean(moved[label] for label in options.between)
        run = runner(profile, length)
        plans = {
            f"{profile.name}, by prediction": plain,
            profile.name: planner.plan(profile.name, profile, run=run),
        }
        short = f"{profile.name}, {budget:.3g} nats"
        plans[short] = planner.plan(short, profile, budgets=Budgets(error=budget), run=run)
        uniforms = {of.label: of.totals for of in plain.choice.uniforms}
        rows[profile.name] = {name: of.choice.totals for name, of in plans.items()} | uniforms
        takes |= {name: of.labels() for name, of in plans.items()}

    runners: dict[str, Runner] = {}
    for label in sorted({label for of in rows.values() for label in of}):
        model = make()
        swap(model, takes[label] if label in takes else uniform(model, label))
        runners[label] = Runner(model, held_out[0][:, :prompt], options.steps)
        gc.collect()
    times = end_to_end(runners, options.rounds)

    figures = []
    for profile in profiles:
        totals_of = rows[profile.name]
        dense = statistics.median(mixed(times[DENSE_LABEL], profile, prompt))
        rest_ms = dense - totals_of[DENSE_LABEL].time_us / 1e3
        print(f"\n{profile.name}: the rest of the model takes {rest_ms:.2f} ms", flush=True)
        for name, totals in totals_of.items():
            of = sorted(mixed(times[name], profile, prompt))
            timed = name in takes or totals.num_bytes == runners[name].linear_bytes
            figures.append(
                Figures(
                    profile=profile.name,
                    plan=name,
                    predicted_ms=rest_ms + totals.time_us / 1e3 if timed else None,
                    measured_ms=statistics.median(of),
                    low_ms=of[len(of) // 5],
                    high_ms=of[-1 - len(of) // 5],
                    linear_bytes=runners[name].linear_bytes,
                    error=totals.error,
                )
            )
    print(f"\n{options.model.name}, {torch.get_num_threads()} threads; {kind}\n")
    print(table(figures))
    if options.json:
        rows_of = [asdict(of) for of in figures]
        options.json.write_text(json.dumps({"kind": kind, "rows": rows_of}, indent=1))


def table(figures: Iterable[Figures]) -> str:
    lines = [
        "| profile | plan | predicted, ms | measured (p20, p80) | off | linears, MB | nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in figures:
        predicted, off = "lost", ""
        if of.predicted_ms is not None:
            predicted = f"{of.predicted_ms:.2f}"
            off = f"{of.predicted_ms / of.measured_ms - 1:+.1%}"
        lines.append(
            f"| {of.profile} | {of.plan} | {predicted} | {of.measured_ms:.2f} ({of.low_ms:.2f}, "
            f"{of.high_ms:.2f}) | {off} | {of.linear_bytes / 1e6:.0f} | {of.error:.3g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
