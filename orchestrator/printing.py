"""What commands print: results to standard output, all else to standard error."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ERR = Console(stderr=True)
OUT = Console()


def say(line: str) -> None:
    """One line to standard error as it is: unwrapped, and brackets in names are no markup."""
    ERR.print(escape(line), highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))  # noqa: T201 - the command's result


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    table = Table(show_header=False, box=None)
    for label, count in plan["layers"].items():
        table.add_row(f"{count} linears", label)
    memory = sum(plan["worker_memory_bytes"].values()) / 2**30
    device = plan["device"]
    table.add_row("blocks", f"{plan['blocks']} of {plan['model']}")
    table.add_row("workers", f"{plan['workers']} on {device['device']} ({device['name']})")
    table.add_row("memory", f"about {memory:.1f} GiB each")
    table.add_row("store", escape(plan["store"]))
    OUT.print(table)


def status_line(facts: dict[str, Any]) -> str:
    state = "finished" if facts["finished"] else "unfinished"
    return f"{facts['job']}: {state}, {facts['blocks_done']} of {facts['blocks']} blocks"


def print_metrics(variants: dict[str, dict[str, dict[str, float]]]) -> None:
    tasks = {task: metrics for rows in variants.values() for task, metrics in rows.items()}
    table = Table("model")
    for task, metrics in tasks.items():
        for metric in metrics:
            table.add_column(f"{task}\n{metric}", justify="right")
    for name, rows in variants.items():
        cells = [f"{rows[t][m]:.4f}" if t in rows else "" for t in tasks for m in tasks[t]]
        table.add_row(name, *cells)
    OUT.print(table)


def print_report(result: Any, log: Path) -> None:
    report = result.report
    if result.already_finished:
        say("this job is finished already; its report says:")
    if report["evaluation"]:
        print_metrics(report["evaluation"])
    for key, what in (("fallbacks", "rounded plainly"), ("raised_damping", "damped more")):
        if report[key]:
            OUT.print(f"{what}: {', '.join(report[key])}", highlight=False, soft_wrap=True)
    sizes = report["bytes"]
    lines = (
        f"artifact  {result.store}  ({sizes['quantized'] / 1e6:.1f} MB; "
        f"source {sizes['source'] / 1e6:.1f} MB)",
        f"fetch it  quantfleet fetch {result.store} ./out",
        f"log       {log}",
    )
    for line in lines:
        OUT.print(escape(line), highlight=False, soft_wrap=True)
