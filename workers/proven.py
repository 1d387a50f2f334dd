"""What whole models took end to end, kept beside the measurement cache for later plans.

    STORE/measurements/ends/<the model>/<start of the content's SHA-256>.json
    {"version": 1, "runs": {"<digest of all that a run hangs on>":
     {"hardware": "NVIDIA H200, ...", "plans": {"<digest of a plan's labels>":
      {"median_us": 5210.0, "low_us": ...}, ...}}, ...}}

Plans that took turns are told together: times of another hour may be off by more than plans differ.
So a run is kept, and found again, as a whole; orchestrator/plan_proving.py has its digest. Many
write, who reads merges (gathered.py): of two of the same the better known. What cannot be read, or
is of another version, is named, ignored and left where it is.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from quantcore.autoquant.measurements import Timing
from quantcore.errors import DAMAGE, why_damaged
from workers import gathered
from workers.layout import MEASUREMENTS, dump
from workers.store import Store, open_store

VERSION = 1


@dataclass(frozen=True, slots=True)
class Run:
    hardware: str  # for a reader: the digest has it, too
    plans: Mapping[str, Timing]  # by a digest of what each layer takes

    def knowledge(self) -> tuple[object, ...]:
        """Of two runs, the greater is the better known: a total order."""
        return tuple(self.plans[plan].knowledge() for plan in sorted(self.plans))


Runs = Mapping[str, Run]  # by digest


def open_ends(url: str, model: str, patience_s: float = 0.0) -> Store:
    """Of an `output.store`."""
    return open_store(f"{url.rstrip('/')}/{MEASUREMENTS}/ends/{model}", patience_s=patience_s)


def keep(store: Store, digest: str, run: Run) -> None:
    gathered.keep(store, _data([{digest: run}]))


def known(store: Store, warn: Callable[[str], None]) -> dict[str, Run]:
    """All that ran; `warn` is told of files of no use."""
    found = gathered.gather(store, _read)
    for name, runs in found.items():
        if isinstance(runs, str):
            warn(f"{store.url}/{name} is ignored: {runs}")
    return _merged(_useful(found).values())


def tidy(store: Store) -> None:
    """One file instead of many, for the next reader's sake."""
    gathered.tidy(store, _useful(gathered.gather(store, _read)), _data)


def _data(many: Iterable[Runs]) -> bytes:
    runs = {digest: asdict(run) for digest, run in _merged(many).items()}
    return dump({"version": VERSION, "runs": runs})


def _merged(many: Iterable[Runs]) -> dict[str, Run]:
    together: dict[str, Run] = {}
    for runs in many:
        for digest, run in runs.items():
            together[digest] = max(together.get(digest, run), run, key=Run.knowledge)
    return together


def _useful(found: Mapping[str, Runs | str]) -> dict[str, Runs]:
    return {name: runs for name, runs in found.items() if not isinstance(runs, str)}


def _read(_place: str, data: bytes) -> Runs | str:
    """Why it is of no use, if it is of none."""
    try:
        told = json.loads(data)
        if told["version"] != VERSION:
            return f"runs of version {told['version']} where this reads {VERSION}"
        return {
            digest: Run(
                str(run["hardware"]), {plan: Timing(**of) for plan, of in run["plans"].items()}
            )
            for digest, run in told["runs"].items()
        }
    except DAMAGE as error:
        return f"runs: damaged ({why_damaged(error)}): delete it to have them anew"
