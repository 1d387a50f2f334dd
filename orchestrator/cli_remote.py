"""Commands for jobs on a cluster that is reached over the network: submit, logs, cancel."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.printing import OUT, print_json, reported, say

if TYPE_CHECKING:
    from orchestrator.ray_jobs import RemoteJobs

DashboardUrl = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["QUANTFLEET_ADDRESS", "RAY_ADDRESS"],
        help="The cluster's dashboard: http://HOST:8265.",
    ),
]
Identifier = Annotated[str, typer.Argument(help="What submit printed.", metavar="ID")]


def submit(
    job: Annotated[Path, typer.Argument(help="The job file (YAML).", metavar="JOB.YAML")],
    address: DashboardUrl,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show its log to the end.")
    ] = False,
    wheel: Annotated[
        Path | None, typer.Option(help="quantfleet as a wheel, where the image lacks it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send a job to a cluster; its driver runs there, and this machine may leave."""
    with reported(as_json):
        from orchestrator.ray_jobs import RemoteJobs

        jobs = RemoteJobs(address)
        sent = jobs.submit(job, wheel)
        if as_json:
            print_json(sent)
        else:
            OUT.print(sent["id"], highlight=False, soft_wrap=True)
            say(f"follow it with: quantfleet logs -f {sent['id']} --address {address}")
        if follow:
            _follow(jobs, sent["id"])


def logs(
    identifier: Identifier,
    address: DashboardUrl,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Show a submitted job's log; with -f, end as the job ends, with its exit code."""
    with reported():
        from orchestrator.ray_jobs import RemoteJobs

        jobs = RemoteJobs(address)
        if follow:
            _follow(jobs, identifier)
        else:
            sys.stdout.write(jobs.logs(identifier))


def cancel(identifier: Identifier, address: DashboardUrl) -> None:
    """End a submitted job; its finished blocks are kept."""
    with reported():
        from orchestrator.ray_jobs import RemoteJobs

        ended = RemoteJobs(address).cancel(identifier)
        say(f"{identifier}: {'asked to end' if ended else 'had ended already'}")


def _follow(jobs: "RemoteJobs", identifier: str) -> None:
    for lines in jobs.follow(identifier):
        sys.stdout.write(lines)
        sys.stdout.flush()
    facts = jobs.status(identifier)
    say(f"{identifier}: {facts['status'].lower()}")
    if facts["exit_code"]:
        raise typer.Exit(facts["exit_code"])
