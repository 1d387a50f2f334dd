"""Events, as structlog has them: always to a file, on demand as JSON lines to standard error."""

import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import structlog


def log_folder() -> Path:
    """$XDG_STATE_HOME/quantfleet/logs: a user's place for logs, outside every artifact."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "quantfleet" / "logs"


def start_log(name: str, file: Path | None, to_stderr: bool) -> tuple[Any, Path]:
    """A logger for one command and the file that it writes."""
    if file is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        file = log_folder() / f"{name}-{stamp}-{os.getpid()}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    sinks: list[TextIO] = [file.open("a", encoding="utf-8", buffering=1)]
    if to_stderr:
        sinks.append(sys.stderr)
    logger = structlog.wrap_logger(
        _Tee(sinks),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
    )
    return logger.bind(job=name), file


class _Tee:
    """The one method that structlog calls for each level, on several streams."""

    def __init__(self, sinks: list[TextIO]) -> None:
        self._sinks = sinks

    def msg(self, line: str) -> None:
        for sink in self._sinks:
            print(line, file=sink)

    info = warning = error = debug = msg
