"""What the store tells of a job with an artifact for each kind: see each_kind.py."""

import json
import re
from typing import Any

from jobs.spec import NAME
from orchestrator.identity import stored_job
from quantcore.errors import StoreError
from workers.layout import EACH_KIND, PLANS
from workers.store import Store, open_store


def stored_each(folder: Store) -> dict[str, Any] | None:
    """The spec, and which artifact the texts are run for; None for a job of one artifact."""
    if not folder.exists(EACH_KIND):
        return None
    try:
        record: dict[str, Any] = json.loads(folder.get(EACH_KIND))
        if not isinstance(record["spec"], dict) or not re.match(NAME, record["first"]):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{folder.url}/{EACH_KIND} is not a job record") from None
    return record


def beside(folder: Store, name: str) -> Store:
    return open_store(f"{folder.url.rpartition('/')[0]}/{name}")


def begun_first(folder: Store) -> str | None:
    """The artifact that the texts are run for, once its job has begun: it stays the first then."""
    record = stored_each(folder)
    if record is None or stored_job(beside(folder, record["first"])) is None:
        return None
    return str(record["first"])


def artifacts_in(folder: Store) -> list[Store]:
    """The jobs of all plans that are there and choose something, whether begun or not."""
    name, record = folder.url.rpartition("/")[2], stored_each(folder)
    overrides = record["spec"]["quantization"]["overrides"] if record else []
    own_schemes = any(override.get("scheme") for override in overrides)
    plans = [
        plan
        for plan in sorted(folder.list(f"{PLANS}/"))
        if own_schemes or not is_dense(folder.get(plan))
    ]
    stems = (plan.removeprefix(f"{PLANS}/").removesuffix(".json") for plan in plans)
    return [beside(folder, f"{name}-{stem}") for stem in stems]


def is_dense(plan: bytes) -> bool:
    """Whether a plan leaves every linear as it is. One that is damaged is told of elsewhere."""
    try:
        return all(layer["candidate"] == "dense" for layer in json.loads(plan)["layers"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
