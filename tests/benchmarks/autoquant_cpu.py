"""Plans on a CPU: what was predicted beside what was measured, end to end, of a real model.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.autoquant_cpu \
        --model FOLDER --text FILE --held-out FILE

A plan is made for decode (one token a call), for prefill, and for a mix of both, with errors in
nats a token, scaled by whole-model checks: without a budget of error, and with one between two
uniform schemes (`--between`). Then, in turns within one run, each plan, the dense model and every
uniform plan are timed end to end: a step of one token after a prompt out of a static cache, and a
prompt.

    predicted   the sum of the plan's linears, and the rest of the model: what the dense model took
                end to end, less what its linears were timed at; none for a uniform plan that lost
                its races, and so was not timed to the end
    measured    medians over rounds; models take turns in each

Linears of one input are joined, the dense model's too; the output head stays dense. Eager: torch's
and Python's own time is in both figures. Both cores must be free.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantcore.autoquant import autoquant, restore
from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import Plan
from quantcore.autoquant.measurements import HardwareKind, Measurements
from quantcore.autoquant.options import Profile
from quantcore.autoquant.race import Effort
from quantcore.joining import join_linears, joinable
from quantcore.quantize import linears_of, quantize_
from quantcore.tensors.layouts import refusal
from tests.benchmarks.decode import Decoder, linear_bytes
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
        self._decoder = Decoder(model, 1, length, compiled=False)
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


def uniform(model: nn.Module, label: str) -> None:
    """The uniform plan: this candidate where it is legal, dense elsewhere."""
    candidate = candidate_of(label)
    if candidate.scheme is not None:
        linears = linears_of(model, None)
        groups = {name: names for names in joinable(model) for name in names}

        def legal(name: str) -> bool:
            assert candidate.scheme is not None
            width, size = linears[name].in_features, candidate.scheme.group_size
            shapes = [(linears[of].out_features, width) for of in groups.get(name, (name,))]
            return not (size and width % size) and not any(
                refusal(candidate.layout, candidate.scheme, shape, "bfloat16", "cpu")
                for shape in shapes
            )

        picked = {name for name in linears if legal(name)}
        quantize_(
            model,
            candidate.scheme,
            lambda name, _: name in picked,
            layout=candidate.layout,
            inductor_settings=False,
        )
    join_linears(model)


def end_to_end(runners: dict[str, Runner], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By runner and kind of call: medians of each round, the first left out. They take turns."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "prefill": []} for name in runners
    }
    for number in range(rounds + 1):
        for name, runner in runners.items():
            found = {"decode": runner.decode_ms(), "prefill": runner.prefill_ms()}
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
        "--between", nargs=2, default=("int8 sym channel plain", "int4 sym g64 int4_cpu")
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
    known = Measurements(of={})
    plans: dict[tuple[str, str], Plan] = {}

    def made(profile: Profile, budgets: Budgets) -> Plan:
        nonlocal known
        start = time.perf_counter()
        model = make()
        auto = autoquant(
            model,
            options.candidates,
            profile=profile,
            budgets=budgets,
            held_out=held_out,
            join=True,
            measurements=known,
            hardware=hardware,
            effort=Effort(seconds=options.seconds),
        )
        model(recorded)
        known = auto.measurements
        assert auto.plan is not None
        seconds = time.perf_counter() - start
        print(f"{profile.name}, {budgets}: planned in {seconds:.1f} s", flush=True)
        for check in auto.plan.checks:
            print(f"    {check}", flush=True)
        return auto.plan

    for profile in profiles:
        plan = plans[profile.name, "fastest"] = made(profile, Budgets())
        errors = {of.label: of.totals.error for of in plan.choice.uniforms}
        budget = statistics.mean(errors[label] for label in options.between)
        plans[profile.name, f"{budget:.3g} nats"] = made(profile, Budgets(error=budget))

    runners: dict[str, Runner] = {}
    for key, plan in plans.items():
        model = make()
        restore(model, plan, hardware=hardware, join=True)
        runners[" ".join(key)] = Runner(model, held_out[0][:, :prompt], options.steps)
    labels = sorted({of.label for plan in plans.values() for of in plan.choice.uniforms})
    for label in labels:
        model = make()
        uniform(model, label)
        runners[label] = Runner(model, held_out[0][:, :prompt], options.steps)
        gc.collect()
    times = end_to_end(runners, options.rounds)

    figures = []
    for profile in profiles:
        first = plans[profile.name, "fastest"]
        uniforms = {of.label: of.totals for of in first.choice.uniforms}
        dense = statistics.median(mixed(times["dense"], profile, prompt))
        rest_ms = dense - uniforms["dense"].time_us / 1e3
        print(f"\n{profile.name}: the rest of the model takes {rest_ms:.2f} ms", flush=True)
        rows = {f"{name} {which}": plan.choice.totals for (name, which), plan in plans.items()}
        rows = {name: of for name, of in rows.items() if name.startswith(profile.name)} | uniforms
        for name, totals in rows.items():
            of = sorted(mixed(times[name], profile, prompt))
            timed = name not in uniforms or totals.num_bytes == runners[name].linear_bytes
            figures.append(
                Figures(
                    profile=profile.name,
                    plan=name.removeprefix(profile.name + " "),
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
