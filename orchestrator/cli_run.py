"""What `run` and `resume` do once a job is read: one artifact, or one for each kind of hardware."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.printing import (
    ERR,
    interrupt,
    print_artifacts,
    print_json,
    print_report,
    say,
)
from quantcore.errors import QuantfleetError, SpecError

if TYPE_CHECKING:  # importing torch takes seconds: `quantfleet --help` need not
    from jobs.load import Document
    from jobs.spec import JobSpec
    from orchestrator.checks import Prepared
    from orchestrator.driver import JobResult
    from orchestrator.each_kind import EachKind
    from orchestrator.executors import Executor
    from orchestrator.site import Site
    from quantcore.errors import Fault
    from workers.plan import Plan
    from workers.store import Store


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command tells what."""

    as_json: bool
    log_file: Path | None
    log_json: bool

    @property
    def quiet(self) -> bool:
        return self.as_json or self.log_json


def look_at_job(
    spec: "JobSpec", document: "Document", faults: "list[Fault]", **looking: Any
) -> "Prepared | EachKind":
    """Raises JobFaults with every fault found."""
    if spec.quantization.planning.each_kind:
        from orchestrator.each_kind import check_each

        return check_each(spec, document, faults, **looking)
    from orchestrator.checks import prepare

    return prepare(spec, document, faults, **looking)


def first_of(todo: "Prepared | EachKind") -> "Prepared":
    from orchestrator.checks import Prepared

    return todo if isinstance(todo, Prepared) else todo.first


def run_and_print(todo: "Prepared | EachKind", site: "Site", output: Output) -> None:
    from orchestrator.checks import Prepared
    from orchestrator.log import start_log
    from workers.store import open_store

    log, path = start_log(todo.spec.name, output.log_file, output.log_json)
    if not isinstance(todo, Prepared):
        with _each_waiting_note(todo):
            _run_each(todo, site, output, log, path)
        return
    with _waiting_note(open_store(todo.plan.store)):
        result = _run(todo, site, output, log)
    if output.as_json:
        print_json({"store": result.store, "log": str(path), "report": result.report})
        return
    print_report(result, path)


def _run_each(each: "EachKind", site: "Site", output: Output, log: Any, path: Path) -> None:
    """One job after the other. Each one's checks come first, of what only its turn can show."""
    from orchestrator.each_kind import facts

    each.begin()
    told = []
    for number, artifact in enumerate(each.artifacts, 1):
        name = artifact.spec.name
        log.info("artifact", name=name, number=number, hardware=artifact.hardware)
        if not output.quiet:
            say(f"{number} of {len(each.artifacts)}: {name}")
        prepared = each.prepared(artifact, site.look_at)
        told.append(facts(artifact, _run(prepared, site, output, log)))
    if output.as_json:
        print_json({"store": each.store.url, "log": str(path), "artifacts": told})
        return
    print_artifacts(told, path)


def _run(prepared: "Prepared", site: "Site", output: Output, log: Any) -> "JobResult":
    from orchestrator.driver import run_job
    from orchestrator.loop import Observers
    from orchestrator.progress import Watcher

    def start_workers(plan: "Plan") -> "Executor":
        executor = site.start_workers(plan, prepared)
        signal.signal(signal.SIGTERM, interrupt)  # Ray took it for itself
        if site.cluster is not None:
            from orchestrator.ray_metrics import RayMetrics

            observers.add(RayMetrics(site.cluster, prepared.spec.name))
        return executor

    watcher = Watcher(ERR, log, quiet=output.quiet)
    observers = Observers(watcher)
    for note in prepared.notes if not output.quiet else ():
        say(note)  # which plan is followed, and what else is to be known
    try:
        return run_job(prepared, start_workers, observers)
    except BaseException as error:
        log.error("job ended", error=type(error).__name__, message=str(error))
        raise
    finally:
        watcher.close()


@contextlib.contextmanager
def _waiting_note(store: "Store") -> Iterator[None]:
    """However a started job ends early, say what is kept and how to go on."""
    from orchestrator.stored import kept_blocks

    try:
        yield
    except SpecError:  # the store holds a job that this one is not: going on with it is no advice
        raise
    except (QuantfleetError, KeyboardInterrupt):
        with contextlib.suppress(QuantfleetError):
            kept, total = kept_blocks(store)
            if total:
                go_on = f"go on with: quantfleet resume {store.url}"
                say(f"{kept} of {total} blocks are kept; {go_on}")
        raise


@contextlib.contextmanager
def _each_waiting_note(each: "EachKind") -> Iterator[None]:
    """The same for all artifacts of a job, once the first has begun."""
    from orchestrator.each_stored import begun_first
    from orchestrator.stored import job_status

    try:
        yield
    except SpecError:
        raise
    except (QuantfleetError, KeyboardInterrupt):
        with contextlib.suppress(QuantfleetError):
            if begun_first(each.store) is not None:
                found = job_status(each.store)["artifacts"]
                made = sum(facts["finished"] for facts in found)
                say(
                    f"{made} of {len(found)} artifacts are made, and the blocks of others are "
                    f"kept; go on with: quantfleet resume {each.store.url}"
                )
        raise
