"""Where `quantfleet plan` leaves its plans, and what it says of them."""

from pathlib import Path
from typing import Any

from orchestrator.planned import Planned
from orchestrator.to_plan import ToPlan
from quantcore.autoquant import finalists
from quantcore.autoquant.document import Plan, file_name, parse, written
from quantcore.autoquant.options import noise
from quantcore.autoquant.telling import errors_told, shown, times_told
from quantcore.errors import SpecError, StoreError
from workers.layout import MEASUREMENTS
from workers.store import open_file, open_store


def places(job: ToPlan, output: str | None) -> list[str]:
    """The file of each kind's plan. Raises before anything is measured where one is in the way."""
    if output is not None and len(job.kinds) > 1:
        named = ", ".join(file_name(kind.hardware) for kind in job.kinds)
        raise SpecError(f"--output: there are {len(job.kinds)} plans, {named}: leave it out")
    found = [output or file_name(kind.hardware) for kind in job.kinds]
    for place in found:
        store, name = open_file(place)
        if not store.exists(name):
            continue
        try:
            parse(store.get(name).decode())
        except (SpecError, UnicodeDecodeError):
            raise StoreError(
                f"{place} is there already, and is no plan: name another file by --output"
            ) from None
    return found


def leave(job: ToPlan, plan: Plan, place: str) -> str:
    """Write a plan to its file, over an older one, and to the job's folder; where it is there."""
    document = written(plan).encode()
    store, name = open_file(place)
    store.put(name, document)
    planned = Planned(plan, document)
    folder = open_store(job.folder)
    folder.put(planned.name, document)
    return f"{folder.url}/{planned.name}"


def facts(plan: Plan, place: str, url: str) -> dict[str, Any]:
    return {
        "plan": str(Path(place)) if "://" not in place else place,
        "store": url,
        "errors": errors_told(plan),
        "times": times_told(plan),
        "noise": noise(plan.measured),
        "noise_end_to_end": _noise_end_to_end(plan),
        **shown(plan),
    }


def _noise_end_to_end(plan: Plan) -> str | None:
    warning = finalists.noise(plan.ends)
    return warning and f"{warning}, once STORE/{MEASUREMENTS}/ends is deleted"
