"""A job's log as a timeline of tasks, a row for each worker: for chrome://tracing or Perfetto."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from quantcore.errors import SourceError


def timeline(log: Path) -> dict[str, Any]:
    """The trace of a log written by `quantfleet run`. Raises SourceError if it is none.

    The format is Chrome's trace events: microseconds, one complete event ("X") per task.
    """
    events: list[dict[str, Any]] = []
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            end = datetime.fromisoformat(record["timestamp"]).timestamp()
            if record["event"] == "task finished":
                events.append(_task(record, end))
            elif record["event"] in {"worker lost", "worker joined"}:
                worker = record["worker"]
                events.append(_mark(record["event"], end, worker))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{log} is not a log of quantfleet run: {error}") from None
    return {"traceEvents": sorted(events, key=lambda event: float(event["ts"]))}


def _task(record: dict[str, Any], end: float) -> dict[str, Any]:
    seconds = float(record["seconds"])
    known = ("task", "block", "shard", "job", "worker")
    return {
        "name": record["task"],
        "cat": record["task"].partition("/")[0],
        "ph": "X",
        "ts": (end - seconds) * 1e6,
        "dur": seconds * 1e6,
        "pid": 0,
        "tid": record["worker"],
        "args": {name: record[name] for name in known if name in record},
    }


def _mark(event: str, at: float, worker: int) -> dict[str, Any]:
    return {"name": event, "ph": "i", "s": "t", "ts": at * 1e6, "pid": 0, "tid": worker}
