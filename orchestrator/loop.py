"""Carries a scheduler's instructions out on an executor, and tells an observer what happens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.bag import name_of
from orchestrator.executors import Arrival, Executor, Loss, News, Refusal, Result
from orchestrator.scheduler import (
    Assignment,
    Event,
    Failed,
    Finished,
    InputsMissing,
    Joined,
    Release,
    Run,
    Scheduler,
    Stop,
    Work,
    WorkerLost,
)

Summaries = dict[str, dict[str, Any]]  # by task
_TOLD_AT_ONCE = {"peak_bytes", "received", "spent"}  # of a summary: what is not kept


class Observer:
    """What a driver tells while it works; the base class listens and says nothing."""

    def phase(self, name: str, steps: int, done: int = 0) -> None: ...
    def submitted(self, assignment: Assignment, worker: int) -> None: ...
    def progressed(self, assignment: Assignment, done: int, total: int) -> None: ...
    def finished(self, assignment: Assignment, result: Result) -> None: ...
    def note(self, event: str, **facts: Any) -> None: ...


class Observers(Observer):
    """Several observers, each told of everything."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        for observer in self._observers:
            observer.phase(name, steps, done)

    def submitted(self, assignment: Assignment, worker: int) -> None:
        for observer in self._observers:
            observer.submitted(assignment, worker)

    def progressed(self, assignment: Assignment, done: int, total: int) -> None:
        for observer in self._observers:
            observer.progressed(assignment, done, total)

    def finished(self, assignment: Assignment, result: Result) -> None:
        for observer in self._observers:
            observer.finished(assignment, result)

    def note(self, event: str, **facts: Any) -> None:
        for observer in self._observers:
            observer.note(event, **facts)


@dataclass(slots=True)
class Timings:
    started: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, tuple[int, float]] = field(default_factory=dict)  # by kind: count, seconds
    peaks: dict[int, dict[str, int]] = field(default_factory=dict)  # by worker: bytes at most

    def of_phase(self, name: str, start: float) -> None:
        self.phases[name] = round(time.perf_counter() - start, 3)

    def of_task(self, result: Result) -> None:
        kind = result.assignment.partition("/")[0]
        count, seconds = self.tasks.get(kind, (0, 0.0))
        self.tasks[kind] = (count + 1, seconds + result.seconds)
        known = self.peaks.setdefault(result.worker, {})
        for place, peak in result.summary.get("peak_bytes", {}).items():
            known[place] = max(peak, known.get(place, 0))


def execute(
    works: Sequence[Work],
    executor: Executor,
    observer: Observer,
    timings: Timings,
    may_go_on: Callable[[], None] = lambda: None,
) -> Summaries:
    """Do some works to their end; every task's summary. Raises the error that ended it.

    `may_go_on` is asked at every event, and raises if this driver is not to go on.
    """
    scheduler = Scheduler(works)
    state = _Execution(executor, observer, timings)
    present = executor.present()
    event: Event = Joined(present, tuple(executor.speed(worker) for worker in present))
    executor.on_progress = state.progressed
    while True:
        for instruction in scheduler.handle(event):
            match instruction:
                case Run(assignment, worker):
                    state.running[assignment.id] = assignment
                    observer.submitted(assignment, worker)
                    executor.submit(worker, assignment)
                case Release(name):
                    executor.release(name)
                case Stop(complete):
                    if complete:
                        return state.summaries
                    assert state.failure is not None
                    raise state.failure
        may_go_on()
        event = state.hear(executor.next_news())


@dataclass(slots=True)
class _Execution:
    """What is under way, and what came of it so far."""

    executor: Executor
    observer: Observer
    timings: Timings
    running: dict[str, Assignment] = field(default_factory=dict)
    summaries: Summaries = field(default_factory=dict)
    failure: Exception | None = None  # the last that was heard of

    def progressed(self, assignment: str, done: int, total: int) -> None:
        if assignment in self.running:  # an answer may come late
            self.observer.progressed(self.running[assignment], done, total)

    def hear(self, news: News) -> Event:
        """What happened, as the scheduler knows it."""
        note = self.observer.note
        present = len(self.executor.present())
        match news:
            case Arrival(worker):
                note("worker joined", worker=worker, present=present)
                return Joined((worker,), (self.executor.speed(worker),))
            case Loss(worker, error, parts_kept):
                note("worker lost", worker=worker, present=present, why=str(error))
                self.failure = error
                return WorkerLost(worker, parts_kept)
            case Refusal(machine, error):
                note("machine refused", machine=machine, why=str(error))
                return Joined(())
            case Result(error=None):
                return self._finished(news)
            case Result(missing=()):
                self.failure = news.error
                return Failed(news.assignment)
        note("results missing", of=list(news.missing))
        self.failure = news.error
        return InputsMissing(news.assignment, news.missing)

    def _finished(self, result: Result) -> Event:
        assignment = self.running.pop(result.assignment, None)
        if assignment is None:  # begun in a phase that did not need it any more
            return Finished(result.assignment)
        self.timings.of_task(result)
        facts = {key: fact for key, fact in result.summary.items() if key not in _TOLD_AT_ONCE}
        if facts:  # most have none: what is kept must not grow with the tasks
            self.summaries[name_of(assignment)] = facts
        self.observer.finished(assignment, result)
        if "spilled" in result.summary:
            place = result.summary["spilled"]
            self.observer.note("memory ran out", worker=result.worker, states_now_on=place)
        return Finished(result.assignment, result.seconds)
