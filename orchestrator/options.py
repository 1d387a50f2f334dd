"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
LogFile = Annotated[Path | None, typer.Option(help="Where events are logged (JSON lines).")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Events to standard error as JSON too.")]
InProcess = Annotated[bool, typer.Option("--in-process", help="Run without Ray, in one process.")]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="A Ray cluster that this machine is a node of: auto, or HOST:PORT.",
    ),
]
