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

from orchestrator.units import gib
from quantcore.errors import JobFaults, QuantfleetError
from workers.layout import PICTURE

ERR = Console(stderr=True)
OUT = Console()
INTERRUPTED = 130


def say(line: str) -> None:
    """One line to standard error as it is: unwrapped, and brackets in names are no markup."""
    ERR.print(escape(line), highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))  # noqa: T201 - the command's result


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """The plan, and what it is predicted to need: bytes at most, times about."""
    if as_json:
        print_json(plan)
        return
    team = (f"{d['workers']} workers on {d['device']} ({d['name']})" for d in plan["devices"])
    layers = (f"{count} linears {label}" for label, count in plan["layers"].items())
    lines = (
        f"{plan['blocks']} blocks of {plan['model']}: {', '.join(layers)}",
        *team,
        f"store {plan['store']}",
        *plan["predicted"]["notes"],
    )
    for line in lines:
        OUT.print(escape(line), highlight=False, soft_wrap=True)
    OUT.print(_needs(plan["predicted"], plan["workers"]))


def _needs(predicted: dict[str, Any], workers: int) -> Table:
    worker, job = predicted["worker"], predicted["job"]
    table = Table("at most", "each worker", "whole job", "for", box=None, pad_edge=False)
    for place in ("host", "device"):
        need = worker[place]
        if need["phase"] is not None:
            parts = _largest(need["phases"][need["phase"]])
            total = gib(workers * need["bytes"])
            table.add_row(f"{place} memory", gib(need["bytes"]), total, f"{need['phase']}: {parts}")
    for label, parts in (
        ("object store", job["object_store_bytes"]),
        ("scratch disk", worker["scratch_bytes"]),
        ("store", job["store_bytes"]),
        ("read and sent", job["network_bytes"]),
    ):
        total = sum(parts.values())
        each = gib(total) if label == "scratch disk" else ""
        whole = gib(workers * total) if label == "scratch disk" else gib(total)
        table.add_row(label, each, whole, _largest(parts))
    phases = ", ".join(f"{phase} {_time(s)}" for phase, s in job["seconds"].items())
    whole = _time(sum(job["seconds"].values()))
    table.add_row("time, about", "", whole, f"{phases}; by {predicted['rates']}")
    return table


def probe_line(facts: dict[str, Any]) -> str:
    """What the probe found, beside what was predicted."""
    memory = ", ".join(
        f"{place} memory {gib(need['scaled'])} (predicted {gib(need['predicted'])})"
        for place, need in facts["bytes"].items()
    )
    took = ", ".join(f"{step} {s:.2f} s" for step, s in facts["seconds"].items())
    quantize = facts["quantize_seconds"]
    return (
        f"probe: block {facts['block']}: {took}; {memory}; quantizing takes about "
        f"{_time(quantize['scaled'])} (predicted {_time(quantize['predicted'])})"
    )


def _largest(parts: dict[str, int]) -> str:
    """The parts that matter, largest first."""
    total = sum(parts.values())
    found = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{part} {gib(size)}" for part, size in found if size > total / 100)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def status_line(facts: dict[str, Any]) -> str:
    if "artifacts" in facts:
        return "\n".join(map(status_line, facts["artifacts"]))
    if facts["blocks"] is None:
        return f"{facts['job']}: not begun"
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
        f"profile   {result.store}/{PICTURE}",
        f"fetch it  quantfleet fetch {result.store} ./out",
        f"log       {log}",
    )
    for line in lines:
        OUT.print(escape(line), highlight=False, soft_wrap=True)


def print_artifacts(artifacts: list[dict[str, Any]], log: Path) -> None:
    """What a job with an artifact for each kind made: predictions are their plans'."""
    table = Table("predicted", "time (us)", "error", "bytes", "artifact", box=None, pad_edge=False)
    for facts in artifacts:
        said = facts["predicted"]
        figures = (f"{said['time_us']:.6g}", f"{said['error']:.6g}", str(said["num_bytes"]))
        table.add_row(escape(facts["job"]), *figures, f"{facts['bytes'] / 1e6:.1f} MB")
    OUT.print(table)
    if any(facts["evaluation"] for facts in artifacts):
        print_metrics({facts["job"]: facts["evaluation"] for facts in artifacts})
    for facts in artifacts:
        done = " (finished already)" if facts["already_finished"] else ""
        for line in (
            f"{facts['job']}{done}",
            f"  made for  {facts['hardware']}",
            f"  {facts['inputs']}",
            f"  plan      {facts['plan']}",
            f"  fetch it  quantfleet fetch {facts['store']} ./out",
        ):
            OUT.print(escape(line), highlight=False, soft_wrap=True)
    errors = {facts["errors"] for facts in artifacts}
    for line in (*sorted(errors), f"log       {log}"):
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
