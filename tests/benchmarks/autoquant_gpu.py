"""Plans of a Llama on one GPU: how soon they are made, whether two runs agree, and what they take.

    python -m tests.benchmarks.autoquant_gpu --json OUT.json
    python -m tests.benchmarks.autoquant_gpu --layers 8 --candidates default int4 float8   # shorter
    python -m tests.benchmarks.autoquant_gpu --device cpu --shape tiny --layers 2 --prompt 64

A model of Llama-3.1-8B's shapes has random bf16 weights: they serve for speed, and its errors are
of no meaning but to be had. Linears of one input are joined; the output head stays dense, since a
prompt asks it for one token. In turn, each for the profiles decode 1, decode 16, prefill and a mix:

    cold      a plan with no measurement, no finding and no kernel compiled: seconds until it is
              chosen, and until the model is swapped
    cached    the same from what was measured and found
    again     measured anew: on how many layers both agree, and whether the rest are ties (not
              with `--once`)
    budget    from the cache, with an error between two uniform schemes
    proven    from the cache, with a few plans run end to end, one of which is kept (`--prove`)

Then end to end, one after another in this run: dense, the plans, uniform plans that lost no race
(`--uniforms` of them, by predicted time), and dense again. On a GPU all are replays of CUDA graphs:
of a decode step, out of a static cache, and of a prompt's forward.

    predicted   the sum of the plan's linears, and the rest of the model: what the dense model took
                end to end, less what its linears were timed at
    measured    medians, with 20th and 80th percentiles

`--deadline` seconds after its start no proof and no uniform plan is begun any more; it says which.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantcore.autoquant.candidates import CLASSES, DENSE_LABEL
from quantcore.autoquant.choice import Budgets, uniform_labels
from quantcore.autoquant.document import Plan, written
from quantcore.autoquant.measurements import HardwareKind, Measurements
from quantcore.autoquant.options import Profile
from tests.benchmarks.block_costs import SHAPES
from tests.benchmarks.decode import WHOLE, random_model
from tests.benchmarks.plan_runs import FREE, Run, runner
from workers.fusing import fuse
from workers.kind import hardware_kind

TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    profile: str
    plan: str
    predicted_ms: float | None
    measured_ms: float
    low_ms: float
    high_ms: float
    linear_bytes: int
    error: float | None  # nats a token, predicted


def agreement(one: Plan, other: Plan) -> dict[str, Any]:
    """Layers on which two plans agree, and of the others, which are ties in either."""
    pairs = list(zip(one.choice.layers, other.choice.layers, strict=True))
    apart = [(a, b) for a, b in pairs if a.option.label != b.option.label]
    ties = [(a, b) for a, b in apart if b.option.label in a.ties or a.option.label in b.ties]
    return {
        "layers": len(pairs),
        "agree": len(pairs) - len(apart),
        "ties": len(ties),
        "apart": dict(Counter(f"{a.option.label} -> {b.option.label}" for a, b in apart)),
    }


def told(plan: Plan) -> str:
    """Which candidates stand how often, by the kind of linear."""
    counts: dict[str, Counter[str]] = {}
    for layer in plan.choice.layers:
        kind = layer.layer.rpartition(".")[2]
        counts.setdefault(kind, Counter())[layer.option.label] += 1
    return "; ".join(
        f"{kind}: {', '.join(f'{n} {label}' for label, n in of.most_common())}"
        for kind, of in counts.items()
    )


def made(run: Run, profiles: list[Profile]) -> tuple[dict[str, Plan], dict[str, Any]]:
    """Plans by name, and the facts of how they were made."""
    facts: dict[str, Any] = {"seconds": {}, "agreement": {}, "ends": {}}
    plans: dict[str, Plan] = {}

    def plan(name: str, *args: Any) -> Plan:
        found, chosen_s, swapped_s = run.planned(*args)
        facts["seconds"][name] = [round(chosen_s, 2), round(swapped_s, 2)]
        print(f"{name}: {chosen_s:.1f} s, swapped {swapped_s:.1f}; {told(found)}", flush=True)
        if run.options.plans:
            run.options.plans.mkdir(parents=True, exist_ok=True)
            file = "".join(letter if letter.isalnum() else "-" for letter in name)
            (run.options.plans / f"{file}.json").write_text(written(found))
        return found

    for profile in profiles:
        plans[profile.name] = plan(f"cold {profile.name}", profile)
    cold_s = sum(chosen_s for chosen_s, _ in facts["seconds"].values())
    print(f"cold, all profiles: {cold_s:.1f} s", flush=True)
    for check in plans[profiles[0].name].checks:
        print(f"    {check}", flush=True)
    for profile in profiles:
        count = len(run.findings.of)
        both = agreement(plans[profile.name], plan(f"cached {profile.name}", profile))
        print(f"    {both}, {len(run.findings.of) - count} found anew", flush=True)
    known, run.measurements = run.measurements, Measurements(of={})
    for profile in () if run.options.once else profiles:
        again = plan(f"again {profile.name}", profile)
        facts["agreement"][profile.name] = agreement(plans[profile.name], again)
        print(f"    {facts['agreement'][profile.name]}", flush=True)
    run.measurements = known
    for profile in profiles:
        moved = {check.plan: check.measured for check in plans[profile.name].checks}
        if missing := [label for label in run.options.between if label not in moved]:
            print(f"without a budget: no candidate is {missing[0]}")
            break
        budget = statistics.mean(moved[label] for label in run.options.between)
        name = f"{profile.name}, {budget:.3g} nats"
        plans[name] = plan(f"budget {name}", profile, Budgets(error=budget))
    for profile in profiles:
        if profile.name in run.options.prove and not run.late():
            name = f"{profile.name}, proven"
            plans[name] = plan(name, profile, FREE, runner(profile, run.options))
            facts["ends"][profile.name] = [asdict(end) for end in plans[name].ends]
            print("".join(f"    {end}\n" for end in plans[name].ends), flush=True)
    return plans, facts


def end_to_end(run: Run, profiles: list[Profile], plans: dict[str, Plan]) -> list[Row]:
    by_profile = {profile.name: plans[profile.name] for profile in profiles}
    linears = {layer.layer: layer.linears for layer in plans[profiles[0].name].choice.layers}
    times: dict[str, dict[str, list[float]]] = {}

    def take(name: str, labels: dict[str, str], always: bool = True) -> None:
        if run.late() and not always:
            print(f"left out: {name}", flush=True)
            return
        try:
            times[name] = run.timed(labels, profiles)
        except Exception as error:  # whatever it is: the others are told
            print(f"FAILED: {name}: {error!r}"[:400], flush=True)
            return
        print(f"ran {name} ({time.perf_counter() - run.begun_s:.0f} s)", flush=True)

    take(DENSE_LABEL, dict.fromkeys(run.linears, DENSE_LABEL))
    for name, plan in plans.items():
        take(name, plan.labels())
    for label in _uniforms(by_profile.values())[: run.options.uniforms]:
        by_layer = uniform_labels(by_profile[profiles[0].name].measured, label)
        all_of_it = {of: label for layer in by_layer for of in linears[layer]}
        take(label, all_of_it, always=False)
    take("dense again", dict.fromkeys(run.linears, DENSE_LABEL))
    return [
        row
        for profile in profiles
        for row in _rows(profile.name, by_profile[profile.name], plans, times)
    ]


def _lost(plan: Plan, label: str) -> bool:
    labels = uniform_labels(plan.measured, label).values()
    return label != DENSE_LABEL and DENSE_LABEL in labels


def _uniforms(plans: Iterable[Plan]) -> list[str]:
    """Those that lost no race of some profile, the fastest first."""
    found: dict[str, float] = {}
    for plan in plans:
        dense_us = next(of.totals.time_us for of in plan.choice.uniforms if of.label == DENSE_LABEL)
        for of in plan.choice.uniforms:
            if of.label != DENSE_LABEL and not _lost(plan, of.label):
                share = of.totals.time_us / dense_us
                found[of.label] = min(share, found.get(of.label, share))
    return sorted(found, key=lambda label: (found[label], label))


def _rows(
    profile: str, own: Plan, plans: dict[str, Plan], times: dict[str, dict[str, list[float]]]
) -> Iterable[Row]:
    uniforms = {of.label: of.totals for of in own.choice.uniforms}
    rest_ms = None
    if DENSE_LABEL in times:
        dense_ms = statistics.median(times[DENSE_LABEL][profile])
        rest_ms = dense_ms - uniforms[DENSE_LABEL].time_us / 1e3
    for name, found in times.items():
        of = sorted(found[profile])
        plan = plans.get(name)
        label = name.removesuffix(" again")
        totals = plan.choice.totals if plan else uniforms.get(label)
        if plan is not None and plan.profile.name != profile:
            continue  # a plan for other calls
        lost = plan is None and (totals is None or _lost(own, label))
        predicted = None if lost or rest_ms is None or totals is None else totals.time_us / 1e3
        yield Row(
            profile=profile,
            plan=name,
            predicted_ms=None if predicted is None else rest_ms + predicted,  # type: ignore[operator]
            measured_ms=statistics.median(of),
            low_ms=of[len(of) // 5],
            high_ms=of[-1 - len(of) // 5],
            linear_bytes=round(found["bytes"][0]),
            error=None if lost or totals is None else totals.error,
        )


def table(rows: Iterable[Row]) -> str:
    """The rest is in --json."""
    lines = [
        "| profile | plan | predicted, ms | measured (p20, p80) | off | linears, MB | nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in rows:
        predicted, off = "lost", ""
        if of.predicted_ms is not None:
            predicted = f"{of.predicted_ms:.3f}"
            off = f"{of.predicted_ms / of.measured_ms - 1:+.1%}"
        error = "" if of.error is None else f"{of.error:.3g}"
        lines.append(
            f"| {of.profile} | {of.plan} | {predicted} | {of.measured_ms:.3f} ({of.low_ms:.3f}, "
            f"{of.high_ms:.3f}) | {off} | {of.linear_bytes / 1e6:.0f} | {error} |"
        )
    return "\n".join(lines)


def _shown(rows: Sequence[Row], plans: Iterable[str], most: int) -> Iterable[Row]:
    """Of each profile dense, the plans, and the uniform plans that were fastest."""
    by_profile: dict[str, list[Row]] = {}
    for row in rows:
        by_profile.setdefault(row.profile, []).append(row)
    for of in by_profile.values():
        named = [row for row in of if row.plan in (*plans, DENSE_LABEL, f"{DENSE_LABEL} again")]
        uniforms = sorted((row for row in of if row not in named), key=lambda row: row.measured_ms)
        yield from [*named, *uniforms[:most]]


def slower(rows: list[Row]) -> list[str]:
    """Plans that an eligible uniform plan, or dense, beats by more than both spread.

    Of a plan that is that uniform plan, it says by how much one plan's two runs are apart.
    """
    lines = []
    for plan in rows:
        if plan.plan != plan.profile and not plan.plan.startswith(f"{plan.profile}, "):
            continue
        budget = plan.plan.endswith(" nats")
        limit = float(plan.plan.split()[-2]) if budget else None
        for other in rows:
            fits = limit is None or (other.error is not None and other.error <= limit * 1.001)
            same = other.profile == plan.profile and not other.plan.startswith(plan.profile)
            if same and fits and other.high_ms < plan.low_ms:
                by = plan.measured_ms / other.measured_ms - 1
                told = (plan.predicted_ms, plan.linear_bytes, plan.error)
                if told == (other.predicted_ms, other.linear_bytes, other.error):
                    lines.append(f"{plan.plan} is {other.plan}: one plan, measured {by:.1%} apart")
                else:
                    lines.append(f"{plan.plan} is {by:.1%} slower than {other.plan}")
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*sorted(WHOLE), "tiny"], default="llama-8b")
    parser.add_argument("--layers", type=int, help="of the shape; all of them by default")
    parser.add_argument("--candidates", nargs="+", choices=sorted(CLASSES), default=["all"])
    parser.add_argument("--profiles", nargs="+", help="names; all four by default")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64, help="of the mix")
    parser.add_argument("--cache", type=int, default=512, help="tokens of the static cache")
    parser.add_argument("--record", type=int, default=512, help="tokens that are recorded")
    parser.add_argument("--held-out", type=int, default=256, help="tokens that are compared")
    parser.add_argument(
        "--between", nargs=2, default=("int8 sym channel", "int4 sym g64"), help="schemes"
    )
    parser.add_argument("--prove", nargs="*", default=["mix"], help="profiles")
    parser.add_argument("--once", action="store_true", help="nothing is measured anew")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each product, at most")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--uniforms", type=int, default=20, help="so many run, the fastest first")
    parser.add_argument("--show", type=int, default=8, help="so many of them in the table")
    parser.add_argument("--deadline", type=float, default=390.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plans", type=Path, help="a folder for the documents")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    from transformers import LlamaConfig

    begun_s = time.perf_counter()
    options = _options()
    shape = TINY if options.shape == "tiny" else SHAPES[options.shape] | WHOLE[options.shape]
    shape = shape | {"num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=False, **shape)
    model = random_model(config, options.device)
    fuse(model)
    kind = hardware_kind(options.device)
    threads = torch.get_num_threads() if options.device == "cpu" else 0
    draw = torch.Generator(options.device).manual_seed(1)
    sizes = (options.record, options.held_out)
    recorded_BT, held_out_BT = (
        torch.randint(config.vocab_size, (1, n), generator=draw, device=options.device)
        for n in sizes
    )
    run = Run(
        model=model,
        options=options,
        hardware=HardwareKind.of(kind, threads=threads),
        recorded_BT=recorded_BT,
        held_out_BT=held_out_BT,
        begun_s=begun_s,
    )
    every = [
        Profile(name="decode_1", calls={1: 1}),
        Profile(name="decode_16", calls={16: 1}),
        Profile(name=f"prefill_{options.prompt}", calls={options.prompt: 1}),
        Profile(name="mix", calls={1: options.steps, options.prompt: 1}),
    ]
    profiles = [of for of in every if of.name in (options.profiles or [of.name])]
    print(f"{options.shape}, {config.num_hidden_layers} layers, {kind}", flush=True)
    print(f"a model was there after {time.perf_counter() - begun_s:.1f} s", flush=True)
    plans, facts = made(run, profiles)
    rows = end_to_end(run, profiles, plans)
    print(f"\n{options.shape}, {config.num_hidden_layers} layers; {kind}\n")
    print(json.dumps(facts["seconds"]))
    print(json.dumps(facts["agreement"]))
    print("\n".join(slower(rows)) or "no plan is slower than dense or a uniform plan that fits")
    print(f"\n{table(_shown(rows, plans, options.show))}")
    if options.json:
        document = {"kind": kind, **facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
