"""quantfleet plan: other choices from what was measured, and what plans say."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.printing import print_json, reported, say, stray_lines_apart, working

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@plans.command(name=DEFAULT)
def plan_job(
    job: Annotated[Path, typer.Argument(help="A job with method: plan.", metavar="JOB.YAML")],
    budget: Annotated[
        list[str] | None,
        typer.Option(help="error=0.5, bytes=4.5GiB or time_us=900; more than one may be given."),
    ] = None,
    least: Annotated[
        Least | None, typer.Option(help="What is to be least within the budgets; else as before.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The new plan; plan-<hardware>.json where left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose again within other budgets from the plan that a job names: nothing is measured."""
    with reported(as_json):
        from orchestrator.plan_facts import compared
        from orchestrator.plan_files import read_plan, write_plan
        from orchestrator.plan_printing import print_compared
        from orchestrator.replan import budgets_of, chosen_again
        from quantcore.autoquant.document import file_name
        from quantcore.errors import SpecError

        if not budget:
            raise SpecError("--budget: write one at least, as --budget error=0.5")
        budgets = budgets_of(budget)
        place = _plan_of(job)
        plan, _ = read_plan(place)
        with working("choosing", as_json), stray_lines_apart():
            chosen = chosen_again(plan, budgets, least.value if least else None)
        written = output or file_name(plan.hardware)
        write_plan(written, chosen)
        facts = compared(plan, chosen)
        if as_json:
            print_json({"plan": written, **facts})
        else:
            print_compared(facts, (place, written))
            say(f"use it with plan: {{path: {written}}}")


@plans.command()
def diff(one: PlanFile, other: PlanFile, as_json: AsJson = False) -> None:
    """Show which layers two plans choose differently, at what cost, and their totals."""
    with reported(as_json):
        from orchestrator.plan_facts import compared
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_compared

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
        from orchestrator.plan_facts import explained
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_explained

        facts = explained(read_plan(plan)[0], layer)
        if as_json:
            print_json(facts)
        else:
            print_explained(facts)


@plans.command()
def show(plan: PlanFile, as_json: AsJson = False) -> None:
    """Show a plan's totals beside those of uniform plans, and what other budgets would give."""
    with reported(as_json):
        from orchestrator.plan_facts import shown
        from orchestrator.plan_files import read_plan
        from orchestrator.plan_printing import print_plan_facts

        facts = shown(read_plan(plan)[0])
        if as_json:
            print_json(facts)
        else:
            print_plan_facts(facts)


def _plan_of(job: Path) -> str:
    """Where a job file's plan is. Raises JobFaults for a bad file, SpecError without a plan."""
    from jobs.load import read_document, resolve_paths, validate
    from quantcore.errors import JobFaults, SpecError

    document = read_document(job)
    spec, faults = validate(document)
    if faults or spec is None:
        raise JobFaults(str(job), faults)
    plan = resolve_paths(spec, job.absolute().parent).quantization.plan
    if plan is None:
        raise SpecError(
            f"{job}: quantization: names no plan to choose from: write method: plan and "
            "plan: {path: ...}"
        )
    return plan.path
