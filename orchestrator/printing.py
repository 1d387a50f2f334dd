"""What commands print: results to standard output, all else to standard error."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantcore.errors import JobFaults, QuantfleetError

ERR = Console(stderr=True)
OUT = Console()
INTERRUPTED = 130


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


def print_submitted(jobs: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(jobs)
    for facts in jobs if not as_json else []:
        line = f"{facts['id']}: {facts['status'].lower()}, {facts['store']}"
        OUT.print(escape(line), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Print an error of ours as one message and end with its exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except JobFaults as error:
        if as_json:
            faults = [
                {"field": f.field, "line": f.line, "column": f.column, "message": f.message}
                for f in error.faults
            ]
            print_json({"faults": faults})
        for line in error.lines():
            say(line)
        raise typer.Exit(error.exit_code) from None
    except QuantfleetError as error:
        say(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    if quiet or not ERR.is_terminal:
        yield
    else:
        with ERR.status(what):
            yield


@contextlib.contextmanager
def byte_bar(total: int, quiet: bool) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    if quiet or not ERR.is_terminal:
        yield lambda name, size: None if quiet else say(f"verified {name}")
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("fetching"), *columns, console=ERR) as bars:
        bar = bars.add_task("fetching", total=total)
        yield lambda name, size: bars.advance(bar, size)
