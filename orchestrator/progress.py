"""What a person sees of a running job: bars at a terminal, plain lines everywhere else."""

import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrator.executors import Result
from orchestrator.loop import Observer
from orchestrator.printing import probe_line
from orchestrator.scheduler import Assignment
from workers.tasks import Diverge, Evaluate, Probe, Prove, Race, Round, Sense, Settle, Survey

_LABELS = {
    "probe": "trying the worst block",
    "survey": "reading the model",
    "quantize": "quantizing",
    "evaluate": "evaluating",
    "sense": "measuring errors",
    "check": "checking whole models",
    "race": "timing",
    "prove": "running whole models",
}
_PLAIN_EVERY_S = 10.0
_STEPS = Probe | Survey | Settle | Round | Evaluate | Sense | Diverge | Race | Prove


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
        self._done = self._before = 0
        self._parts: dict[str, float] = {}  # of tasks under way
        self._started = 0.0
        self._spoken = 0.0

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        self._log.info("phase", name=name, steps=steps, done=done)
        self.close()
        self._phase = _LABELS.get(name, name)
        self._total = steps
        self._done = self._before = done
        self._parts = {}
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
            self._bar = self._bars.add_task(
                self._phase, total=self._total, completed=self._done, rate=""
            )
        else:
            self._say(f"{self._phase}: {self._total - self._done} to do")

    def submitted(self, assignment: Assignment, worker: int) -> None:
        self._log.debug("task started", worker=worker, **_names(assignment))

    def finished(self, assignment: Assignment, result: Result) -> None:
        seconds = round(result.seconds, 3)
        self._log.info("task finished", worker=result.worker, seconds=seconds, **_names(assignment))
        self._parts.pop(assignment.id, None)
        if _counts(assignment):
            self._done += 1
            self._show()

    def progressed(self, assignment: Assignment, done: int, total: int) -> None:
        if _counts(assignment):
            self._parts[assignment.id] = done / total
            self._show()

    def _show(self) -> None:
        if self._quiet or not self._total:
            return
        done = self._done + sum(self._parts.values())
        each = (time.monotonic() - self._started) / max(done - self._before, 1e-9)
        rate = f"{each:.1f} s each" if each >= 1 else f"{1 / max(each, 1e-9):.1f} /s"
        if self._bars is not None:
            self._bars.update(self._bar, completed=done, rate=rate)
        elif done == self._total or time.monotonic() - self._spoken >= _PLAIN_EVERY_S:
            self._spoken = time.monotonic()
            left = each * (self._total - done)
            count = f"{done:.1f}" if self._parts else f"{self._done}"
            self._say(f"{self._phase}: {count}/{self._total}, {rate}, {_clock(left)} left")

    def note(self, event: str, **facts: Any) -> None:
        self._log.info(event, **facts)
        if self._quiet:
            return
        if event == "workers starting":
            counts = Counter(facts["devices"])
            told = " and ".join(f"{count} {device}" for device, count in counts.items())
            self._say(f"starting {told} workers")
        elif event == "finished already":
            self._say("a finished job of this name is there: reading the model to compare")
        elif event == "another driver was here":
            self._say(
                f"another driver (on {facts['host']}, process {facts['pid']}) left no word: "
                f"watching for {facts['seconds']:.0f} s whether it lives"
            )
        elif event == "probed":
            self._say(probe_line(facts))
        elif event == "worker lost":
            self._say(f"worker {facts['worker']} is lost ({facts['why']}); its work is dealt again")
        elif event == "memory ran out":
            where = facts["states_now_on"]
            self._say(
                f"worker {facts['worker']} ran out of memory: hidden states go to the {where}"
            )
        elif event == "machine refused":
            self._say(f"{facts['machine']} takes no part: {facts['why']}")
        elif event in {"measurements ignored", "left out"}:
            self._say(facts["why"])
        elif event == "worker joined":
            self._say(f"worker {facts['worker']} has joined")
        elif event == "quantizing" and facts["done"]:
            self._say(f"{facts['done']} of {facts['blocks']} blocks are finished: going on")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _say(self, line: str) -> None:
        self._console.print(escape(line), highlight=False, soft_wrap=True)


def _names(assignment: Assignment) -> dict[str, Any]:
    """What a task is known by in the log."""
    names: dict[str, Any] = {"task": assignment.id, "kind": type(assignment.task).__name__}
    for field in ("block", "group", "band", "chunks", "first", "last", "variant"):
        if (value := getattr(assignment.task, field, None)) is not None:
            names[field] = value
    if assignment.shard is not None:
        names["shard"] = assignment.shard
    return names


def _counts(assignment: Assignment) -> bool:
    """Whether a task is a step of its phase: a block, not the bookkeeping around it."""
    return isinstance(assignment.task, _STEPS)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
