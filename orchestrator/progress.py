"""What a person sees of a running job: bars at a terminal, plain lines everywhere else."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrator.driver import Observer
from orchestrator.executors import Result
from orchestrator.graph import Node
from workers.tasks import Advance, Evaluate, Publish, Round, Survey

_LABELS = {
    "survey": "reading the model",
    "quantize": "quantizing",
    "evaluate": "evaluating",
}
_PLAIN_EVERY_S = 10.0


class Watcher(Observer):
    """Shows each phase's progress and writes every event to the log."""

    def __init__(self, console: Console, log: Any, *, quiet: bool = False) -> None:
        self._console = console
        self._log = log
        self._quiet = quiet
        self._bars: Progress | None = None
        self._bar: Any = None
        self._phase = ""
        self._total = 0
        self._done = 0
        self._started = 0.0
        self._spoken = 0.0

    def phase(self, name: str, nodes: Sequence[Node]) -> None:
        self._log.info("phase", name=name, tasks=len(nodes))
        self.close()
        self._phase = _LABELS.get(name, name)
        self._total = sum(_steps(node) for node in nodes)
        self._done = 0
        self._started = self._spoken = time.monotonic()
        if self._quiet or not self._total:
            return
        if self._console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
            self._bar = self._bars.add_task(self._phase, total=self._total, rate="")
        else:
            self._say(f"{self._phase}: {self._total} to do")

    def submitted(self, node: Node, worker: int) -> None:
        self._log.debug("task started", task=node.id, worker=worker)

    def finished(self, node: Node, result: Result) -> None:
        self._log.info(
            "task finished", task=node.id, worker=result.worker, seconds=round(result.seconds, 3)
        )
        steps = _steps(node)
        if not steps or self._quiet or not self._total:
            return
        self._done += steps
        elapsed = time.monotonic() - self._started
        each = elapsed / self._done
        rate = f"{each:.1f} s each" if each >= 1 else f"{1 / max(each, 1e-9):.1f} /s"
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done, rate=rate)
        elif self._done == self._total or time.monotonic() - self._spoken >= _PLAIN_EVERY_S:
            self._spoken = time.monotonic()
            left = each * (self._total - self._done)
            self._say(f"{self._phase}: {self._done}/{self._total}, {rate}, {_clock(left)} left")

    def note(self, event: str, **facts: Any) -> None:
        self._log.info(event, **facts)
        if self._quiet:
            return
        if event == "workers starting":
            self._say(f"starting {facts['count']} {facts['device']} workers")
        elif event == "quantizing" and facts["done"]:
            self._say(f"{facts['done']} of {facts['blocks']} blocks are finished: going on")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)


def _steps(node: Node) -> int:
    """What a task counts for in its phase: blocks done or replayed, not bookkeeping."""
    if isinstance(node.task, Advance):
        return int(not any(need.startswith("publish/") for need in node.after))
    return int(isinstance(node.task, Survey | Publish | Round | Evaluate))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
