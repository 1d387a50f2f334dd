"""Plans as tables."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.printing import OUT

_PIPED_WIDTH = 240  # where nobody's screen ends


def print_plan_facts(facts: dict[str, Any]) -> None:
    _line(_made_for(facts, None))
    totals = Table("plan", *_FIGURES, box=None, pad_edge=False)
    totals.add_row("this one", *_figures(facts["totals"]))
    for uniform in facts["uniforms"]:
        fits = "" if uniform["fits"] else " (over the budget)"
        totals.add_row(escape(f"all {uniform['label']}{fits}"), *_figures(uniform["totals"]))
    _table(totals)
    for end in facts["ends"]:
        kept = "kept" if end["kept"] else "not kept"
        interval = f"{end['low_us']:.6g} to {end['high_us']:.6g}"
        measured = f"{end['measured_us']:.6g} us end to end ({interval})"
        predicted = ""
        if end["predicted_us"] is not None:
            predicted = f", predicted {end['predicted_us']:.6g}"
        _line(f"{end['plan']}: {measured}{predicted}, {kept}")
    for label, count in facts["linears"].items():
        _line(f"{count} linears {label}")
    front = Table("other budgets", *_FIGURES, box=None, pad_edge=False)
    for point in facts["front"]:
        front.add_row("", *_figures(point))
    if facts["front"]:
        _table(front)


def print_compared(facts: dict[str, Any], names: Sequence[str]) -> None:
    for at, name in enumerate(names):
        _line(f"{name}: {_made_for(facts, at)}")
    if not facts["same_hardware"]:
        _line("made for different hardware: their times are of different machines")
    elif not facts["same_profile"]:
        _line("made for different profiles: their times are of different calls")
    short = [PurePosixPath(name).name for name in names]
    heads = map(escape, short) if len(set(short)) > 1 else ("first", "second")
    table = Table("layer", *heads, *_pairs(_FIGURES), box=None, pad_edge=False)
    for row in facts["layers"]:
        before, after = (label or "(not in it)" for label in row["candidate"])
        tie = " (a tie)" if row["tie"] else ""
        figures = (_cell(key, value) for key in _KEYS for value in row[key])
        table.add_row(escape(row["layer"]), escape(before), escape(after + tie), *figures)
    totals = (_cell(key, total[key]) for key in _KEYS for total in facts["totals"])
    table.add_row("in total", "", "", *totals)
    _table(table)
    _line(f"{len(facts['layers'])} layers differ, {facts['layers_alike']} do not")


def print_explained(facts: dict[str, Any]) -> None:
    _line(f"{facts['layer']}: {facts['candidate']}")
    if len(facts["linears"]) > 1:
        _line(f"one choice for {', '.join(facts['linears'])}")
    _line(_made_for(facts, None))
    table = Table("candidate", *_FIGURES, "from", "to", "", box=None, pad_edge=False)
    for option in facts["options"]:
        interval = (_cell("time_us", option[key]) for key in ("low_us", "high_us"))
        table.add_row(escape(option["candidate"]), *_figures(option), *interval, option["verdict"])
    _table(table)
    if not facts["all_options"]:
        _line("what else was measured is not in this plan")
    for kernel, factor in facts["factors"].items():
        _line(f"times of {kernel} are {factor:.3g} of what was timed, as whole models ran")
    total = facts["totals"]
    _line(
        f"of {total['time_us']:.6g} us in all, {facts['share_of_time']:.1%}; "
        f"the whole plan has {total['num_bytes']} bytes and error {total['error']:.6g}"
    )
    second = facts["runner_up"]
    if second is None:
        _line("runner-up: none, nothing else keeps the budgets")
    else:
        _line(
            f"runner-up: {second['label']}, by {second['more_us']:+.6g} us, "
            f"{second['more_bytes']:+d} bytes, {second['more_error']:+.6g} error"
        )


_KEYS = ("time_us", "num_bytes", "error")
_FIGURES = ("time (us)", "bytes", "error")


def _made_for(facts: dict[str, Any], at: int | None) -> str:
    made = {
        key: facts[key] if at is None else facts[key][at]
        for key in ("hardware", "profile", "objective", "budgets")
    }
    budgets = " and ".join(f"{name} <= {limit:g}" for name, limit in made["budgets"].items())
    within = f" within {budgets}" if budgets else ""
    return f"{made['hardware']}; {made['profile']}; least {made['objective']}{within}"


def _pairs(words: Iterable[str]) -> list[str]:
    """A heading for the first of two columns; the second one stands beside it."""
    return [heading for word in words for heading in (word, "")]


def _figures(costs: dict[str, Any]) -> list[str]:
    return [_cell(key, costs[key]) for key in _KEYS]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if key == "num_bytes" else f"{value:.6g}"


def _line(text: str) -> None:
    OUT.print(escape(text), highlight=False, soft_wrap=True)


def _table(table: Table) -> None:
    console = OUT if OUT.is_terminal else Console(width=_PIPED_WIDTH)
    console.print(table, highlight=False)
