"""The command line. Jobs on a remote cluster have their commands in cli_remote.py, plans have
theirs in cli_plan.py; what run and resume share is in cli_run.py.

Exit codes: 0 done; 2 bad job file or usage; 3 source or store; 4 resources; 5 quantization;
130 interrupted. Results go to standard output, all else to standard error.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.cli_plan import plans
from orchestrator.cli_remote import cancel, logs, submit
from orchestrator.cli_run import Output, first_of, look_at_job, run_and_print
from orchestrator.options import Address, AsJson, InProcess, LogFile, LogJson
from orchestrator.printing import (
    OUT,
    byte_bar,
    print_json,
    print_metrics,
    print_plan,
    print_submitted,
    reported,
    status_line,
    working,
)
from quantcore.errors import SpecError, StoreError

app = typer.Typer(
    name="quantfleet",
    help="Quantize language models on a fleet: a job file in, an artifact that vLLM loads out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[Path, typer.Argument(help="The job file (YAML).", metavar="JOB.YAML")]
JobUrl = Annotated[str, typer.Argument(help="A job in its store: STORE/NAME.", metavar="JOB")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--address", envvar=["QUANTFLEET_ADDRESS", "RAY_ADDRESS"], help="A Ray dashboard's URL."
    ),
]
app.command()(submit)
app.command()(logs)
app.command()(cancel)
app.add_typer(plans, name="plan")


@app.command()
def run(
    job: JobFile,
    address: Address = None,
    in_process: InProcess = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_json: LogJson = False,
) -> None:
    """Quantize a model as a job file says, here and now. Run again, it goes on."""
    with reported():
        from orchestrator.checks import read_job
        from orchestrator.described import describe
        from orchestrator.site import open_site

        with open_site(address, in_process) as site:
            with working("checking the job", as_json):
                todo = look_at_job(*read_job(job), touch_store=not dry_run, look_at=site.look_at)
            if dry_run:
                print_plan(describe(first_of(todo)), as_json)
                return
            run_and_print(todo, site, Output(as_json, log_file, log_json))


@app.command()
def resume(
    job: JobUrl,
    address: Address = None,
    in_process: InProcess = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_json: LogJson = False,
) -> None:
    """Take up a job from its store alone: the job file that began it is kept there."""
    with reported():
        from orchestrator.each_stored import beside, stored_each
        from orchestrator.identity import stored_job
        from orchestrator.site import open_site
        from orchestrator.stored import kept_texts, stored_spec
        from workers.store import open_store

        store = open_store(job)
        began, each = stored_job(store), None
        if began is None:
            began = each = stored_each(store)
        if began is None:
            raise StoreError(f"{store.url} holds no job that was begun: see quantfleet list")
        spec, document = stored_spec(began, store.url)
        texts = beside(store, each["first"]) if each else store
        with kept_texts(texts, spec) as spec, open_site(address, in_process) as site:
            with working("checking the job", as_json):
                todo = look_at_job(spec, document, [], look_at=site.look_at)
            run_and_print(todo, site, Output(as_json, log_file, log_json))


@app.command()
def check(job: JobFile, as_json: AsJson = False) -> None:
    """Report every fault of a job file at once, with its place and what to write instead."""
    with reported(as_json):
        from orchestrator.checks import read_job
        from orchestrator.described import describe

        with working("checking the job", as_json):
            todo = look_at_job(*read_job(job))
        print_plan(describe(first_of(todo)), as_json)


@app.command()
def status(
    job: Annotated[str, typer.Argument(help="STORE/NAME, or a submitted job's id.", metavar="JOB")],
    address: OnCluster = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a job has come."""
    with reported():
        if address is not None and "/" not in job:
            from orchestrator.ray_jobs import RemoteJobs

            print_submitted([RemoteJobs(address).status(job)], as_json)
            return
        from orchestrator.stored import job_status
        from workers.store import open_store

        facts = job_status(open_store(job))
        if as_json:
            print_json(facts)
        else:
            OUT.print(status_line(facts), highlight=False)


@app.command(name="list")
def list_jobs(
    store: Annotated[
        str | None, typer.Argument(help="A folder or s3://bucket/path.", metavar="STORE")
    ] = None,
    address: OnCluster = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs in a store, or with --address those submitted to a cluster."""
    with reported():
        if store is None:
            if address is None:
                raise SpecError("name a store, or a cluster with --address")
            from orchestrator.ray_jobs import RemoteJobs

            print_submitted(RemoteJobs(address).jobs(), as_json)
            return
        from orchestrator.stored import jobs_in
        from workers.store import open_store

        jobs = jobs_in(open_store(store))
        if as_json:
            print_json(jobs)
        for facts in jobs if not as_json else []:
            OUT.print(status_line(facts), highlight=False)


@app.command()
def fetch(
    job: JobUrl,
    folder: Annotated[Path, typer.Argument(help="A new folder for the artifact.")],
    as_json: AsJson = False,
) -> None:
    """Download a finished artifact, verify every file, and put it in place whole."""
    with reported():
        from orchestrator.fetch import fetch as fetch_job
        from orchestrator.fetch import read_manifest
        from workers.store import open_store

        store = open_store(job)
        total = sum(facts["size"] for facts in read_manifest(store)["files"].values())
        with byte_bar(total, as_json) as advance:
            files = fetch_job(store, folder, advance)
        if as_json:
            print_json({"folder": str(folder), "files": len(files), "bytes": total})
        else:
            line = f"{folder}: {len(files)} files, {total / 1e6:.1f} MB, all verified"
            OUT.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
def timeline(
    log: Annotated[Path, typer.Argument(help="A log of quantfleet run.")],
    output: Annotated[Path, typer.Argument(help="Where to write the trace (JSON).")],
) -> None:
    """Turn a job's log into a timeline of its tasks, for chrome://tracing or Perfetto."""
    with reported():
        import json

        from orchestrator.timeline import timeline as trace_of

        output.write_text(json.dumps(trace_of(log)))


@app.command(name="eval")
def evaluate(  # noqa: PLR0913, PLR0917 - options of a command
    model: Annotated[str, typer.Argument(help="A fetched folder, or a job in its store.")],
    text: Annotated[Path | None, typer.Option(help="A text for word and byte perplexity.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="More lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of context.")] = 1024,
    max_characters: Annotated[int, typer.Option(help="Of the text.")] = 40_000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure a finished model with lm-eval, loaded as its users load it."""
    with reported():
        from orchestrator.stored import evaluate_stored

        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        options = {
            "text": text and text.absolute(),
            "tasks": names,
            "task_folder": task_folder and task_folder.absolute(),
            "limit": limit,
            "length": length,
            "max_characters": max_characters,
        }
        with working("evaluating", as_json):
            metrics = evaluate_stored(model, options, dtype)
        if as_json:
            print_json(metrics)
        else:
            print_metrics({Path(model).name: metrics})


def main() -> None:
    """Entry point; the hub is not asked about models that are named by path."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    sys.exit(app())
