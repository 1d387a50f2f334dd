"""quantfleet plan: measuring, other choices from what was measured, and what plans say."""

import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.options import Address, AsJson, InProcess, LogFile, LogJson
from orchestrator.printing import (
    ERR,
    interrupt,
    print_json,
    reported,
    say,
    working,
)

if TYPE_CHECKING:  # importing torch takes seconds
    from jobs.spec import JobSpec
    from orchestrator.checks import Prepared
    from orchestrator.executors import Executor
    from orchestrator.site import Site

DEFAULT = "job"


class _JobOrCommand(TyperGroup):
    """`plan JOB.YAML` is short for `plan job JOB.YAML`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


class Least(StrEnum):
    TIME = "time"
    ERROR = "error"


plans = typer.Typer(
    cls=_JobOrCommand,
    no_args_is_help=True,
    help=f"Choose and compare plans; the word {DEFAULT} may be left out.",
)

PlanFile = Annotated[str, typer.Argument(help="A plan document: a file, or s3://bucket/path.")]


@plans.command(name=DEFAULT)
def plan_job(  # noqa: PLR0913, PLR0917 - options of a command
    job: Annotated[Path, typer.Argument(help="A job with method: plan.", metavar="JOB.YAML")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="error=0.5, bytes=4.5GiB or time_us=900, more than one if need be: choose again "
            "from the plan that the job names or has in its store, and measure nothing."
        ),
    ] = None,
    least: Annotated[
        Least | None,
        typer.Option(help="With --budget: what is to be least within them; else as before."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The new plan; plan-<hardware>.json where left out.")
    ] = None,
    address: Address = None,
    in_process: InProcess = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_json: LogJson = False,
) -> None:
    """Measure what a job's linears may become and plan it, for each kind of hardware it runs on.

    What the store knows is not measured again.
    """
    with reported(as_json):
        if budget:
            _choose_again(job, budget, least, output, as_json)
            return
        from quantcore.errors import SpecError

        if least is not None:
            raise SpecError("--least: write quantization.plan.least, or a --budget beside it")
        if _spec_of(job).quantization.planning.path is not None:
            raise SpecError(
                "--budget: write one at least, as --budget error=0.5: the job's plan is made "
                "already; or drop its path to have another one measured"
            )
        from orchestrator.site import open_site

        with open_site(address, in_process) as site:
            _measure(job, site, output, as_json, log_file, log_json)


@plans.command()
def diff(one: PlanFile, other: PlanFile, as_json: AsJson = False) -> None:
    """Show which layers two plans choose differently, at what cost, and their totals."""
    with reported(as_json):
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_compared
        from quantcore.autoquant.telling import compared

        facts = compared(read_plan(one)[0], read_plan(other)[0])
        if as_json:
            print_json(facts)
        else:
            print_compared(facts, (one, other))


@plans.command()
def explain(
    layer: Annotated[str, typer.Argument(help="A layer, or a linear of it.")],
    plan: Annotated[str, typer.Option(help="The plan document.")],
    as_json: AsJson = False,
) -> None:
    """Say why a layer takes what it takes: all candidates, and what speaks against each."""
    with reported(as_json):
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_explained
        from quantcore.autoquant.telling import explained

        facts = explained(read_plan(plan)[0], layer)
        if as_json:
            print_json(facts)
        else:
            print_explained(facts)


@plans.command()
def show(plan: PlanFile, as_json: AsJson = False) -> None:
    """Show a plan's totals beside those of uniform plans, and what other budgets would give."""
    with reported(as_json):
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_plan_facts
        from quantcore.autoquant.telling import shown

        facts = shown(read_plan(plan)[0])
        if as_json:
            print_json(facts)
        else:
            print_plan_facts(facts)


def _choose_again(
    job: Path, budget: list[str], least: Least | None, output: str | None, as_json: bool
) -> None:
    from orchestrator.plan_files import read_plan, write_plan
    from orchestrator.plan_printing import print_compared
    from orchestrator.replan import budgets_of, chosen_again
    from quantcore.autoquant.document import file_name
    from quantcore.autoquant.telling import compared

    budgets = budgets_of(budget)
    place = _plan_of(job)
    plan, _ = read_plan(place)
    with working("choosing", as_json):
        chosen = chosen_again(plan, budgets, least.value if least else None)
    written = output or file_name(plan.hardware)
    write_plan(written, chosen)
    facts = compared(plan, chosen)
    if as_json:
        print_json({"plan": written, **facts})
    else:
        print_compared(facts, (place, written))
        say(f"use it with plan: {{path: {written}}}")


def _measure(
    job: Path, site: "Site", output: str | None, as_json: bool, log_file: Path | None, log: bool
) -> None:
    from orchestrator import plan_left
    from orchestrator.log import start_log
    from orchestrator.loop import Observers
    from orchestrator.plan_measuring import measured_plans
    from orchestrator.plan_printing import print_plan_facts
    from orchestrator.progress import Watcher
    from orchestrator.to_plan import check_to_plan
    from quantcore.autoquant.race import Effort

    with working("checking the job", as_json):
        asked = check_to_plan(job, look_at=site.look_at)
        places = plan_left.places(asked, output)
    for note in asked.notes:
        say(note)

    def start(prepared: "Prepared") -> "Executor":
        executor = site.start_workers(prepared.plan, prepared)
        signal.signal(signal.SIGTERM, interrupt)  # Ray took it for itself
        return executor

    logger, path = start_log(asked.spec.name, log_file, log)
    watcher = Watcher(ERR, logger, quiet=as_json or log)
    told = []
    try:
        plans = measured_plans(asked, start, Observers(watcher), Effort())
        for plan, place in zip(plans, places, strict=True):
            url = plan_left.leave(asked, plan, place)
            told.append(plan_left.facts(plan, place, url))
    except BaseException as error:
        logger.error("plan ended", error=type(error).__name__, message=str(error))
        if isinstance(error, KeyboardInterrupt):
            say("what was measured is kept: the same command goes on from there")
        raise
    finally:
        watcher.close()
    if as_json:
        print_json({"plans": told, "log": str(path)})
        return
    for facts in told:
        print_plan_facts(facts)
        for line in (
            facts["noise"],
            facts["noise_end_to_end"],
            facts["times"],
            facts["errors"],
        ):
            if line:
                say(line)
        say(f"{facts['plan']}, and in the store {facts['store']}")
    say(f"follow it: quantfleet run {job}")


def _spec_of(job: Path) -> "JobSpec":
    """A job file alone, its paths absolute. Raises JobFaults for a bad file."""
    from jobs.load import read_document, resolve_paths, validate
    from quantcore.errors import JobFaults

    document = read_document(job)
    spec, faults = validate(document)
    if faults or spec is None:
        raise JobFaults(str(job), faults)
    return resolve_paths(spec, job.absolute().parent)


def _plan_of(job: Path) -> str:
    """Where a job's plan is: at its path, or alone in its folder. Raises SpecError without one."""
    from orchestrator.planned import plans_in_store
    from quantcore.errors import SpecError

    spec = _spec_of(job)
    if spec.quantization.method != "plan":
        raise SpecError(
            f"{job}: quantization: names no plan to choose from: write method: plan, and plan: "
            "{path: ...} or run quantfleet plan without --budget"
        )
    if spec.quantization.planning.path is not None:
        return spec.quantization.planning.path
    first, *others = plans_in_store(spec)
    if others:
        raise SpecError(
            f"{job}: it has {len(others) + 1} plans: write one's place, as plan: {{path: {first}}}"
        )
    return first
