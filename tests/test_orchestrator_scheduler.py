"""The scheduler as a table: any graph, any order of completion, no clock and no executor."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.graph import Node
from orchestrator.scheduler import (
    Event,
    Failed,
    Finished,
    Instruction,
    Release,
    Run,
    Scheduler,
    Started,
    State,
    Stop,
    WorkerLost,
)
from workers.tasks import CopyOutside

TASK = CopyOutside()


@dataclass
class Simulation:
    """Carries instructions out, and holds each to what a scheduler may say at that moment."""

    nodes: Sequence[Node]
    workers: int
    running: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)  # tasks as they were started
    stopped: Stop | None = None

    def __post_init__(self) -> None:
        self.by_id = {node.id: node for node in self.nodes}
        self.scheduler = Scheduler(self.nodes, self.workers)

    def readers(self, task: str) -> set[str]:
        return {n.id for n in self.nodes if any(source == task for source, _ in n.inputs)}

    def send(self, event: Event) -> None:
        if isinstance(event, Finished):
            del self.running[event.task]
            self.finished.add(event.task)
        for instruction in self.scheduler.handle(event):
            assert self.stopped is None, "an instruction after the last one"
            self.carry_out(instruction)
        if self.stopped is None:
            self.check_nobody_waits_needlessly()
            self.check_nothing_is_kept_needlessly()

    def carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Run(task, worker):
                node = self.by_id[task]
                assert task not in self.order, "started twice"
                assert set(node.after) <= self.finished
                assert {source for source, _ in node.inputs} <= self.finished - self.released
                assert node.worker in (None, worker)
                assert worker in range(self.workers)
                assert worker not in self.running.values(), "two tasks at once"
                self.running[task] = worker
                self.order.append(task)
            case Release(task):
                assert task not in self.released, "released twice"
                assert task in self.finished
                assert self.readers(task) <= self.finished
                self.released.add(task)
            case Stop():
                self.stopped = instruction

    def check_nobody_waits_needlessly(self) -> None:
        idle = set(range(self.workers)) - set(self.running.values())
        for node in self.nodes:
            needs = {*node.after, *(source for source, _ in node.inputs)}
            if node.id not in self.order and needs <= self.finished:
                assert self.scheduler.state(node.id) is State.READY
                assert not idle & ({node.worker} - {None} or idle)

    def check_nothing_is_kept_needlessly(self) -> None:
        for node in self.nodes:
            readers = self.readers(node.id)
            if readers and readers <= self.finished:
                assert node.id in self.released


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Node], int]:
    """Any graph without circles, its tasks in any order, some pinned to a worker."""
    workers = draw(st.integers(1, 4))
    nodes: list[Node] = []
    for number in range(draw(st.integers(0, 14))):
        earlier = st.sampled_from([node.id for node in nodes]) if nodes else st.nothing()
        after = draw(st.lists(earlier, max_size=3)) if nodes else []
        inputs = draw(st.lists(st.tuples(earlier, st.integers(0, 2)), max_size=4)) if nodes else []
        nodes.append(
            Node(
                id=f"t{number}",
                task=TASK,
                worker=draw(st.none() | st.integers(0, workers - 1)),
                after=tuple(after),
                inputs=tuple(inputs),
                parts=3,
                cost=draw(st.sampled_from([0.0, 1.0, 2.0])),
            )
        )
    return draw(st.permutations(nodes)), workers


@settings(deadline=None, max_examples=300)
@given(graphs(), st.data())
def test_every_task_runs_once_after_its_needs_and_the_job_ends(
    graph: tuple[list[Node], int], data: st.DataObject
) -> None:
    nodes, workers = graph
    simulation = Simulation(nodes, workers)
    simulation.send(Started())
    while simulation.running:
        assert simulation.stopped is None
        simulation.send(Finished(data.draw(st.sampled_from(sorted(simulation.running)))))
    assert simulation.stopped == Stop(complete=True)
    assert Counter(simulation.order) == Counter(node.id for node in nodes)
    assert all(simulation.scheduler.state(node.id) is State.FINISHED for node in nodes)
    assert simulation.released == {node.id for node in nodes if simulation.readers(node.id)}


@settings(deadline=None)
@given(graphs().filter(lambda graph: graph[0]), st.data(), st.booleans())
def test_a_failure_stops_the_job_for_good(
    graph: tuple[list[Node], int], data: st.DataObject, lost: bool
) -> None:
    simulation = Simulation(*graph)
    simulation.send(Started())
    for _ in range(data.draw(st.integers(0, len(graph[0]) - 1))):
        simulation.send(Finished(data.draw(st.sampled_from(sorted(simulation.running)))))
    task, worker = data.draw(st.sampled_from(sorted(simulation.running.items())))
    simulation.send(WorkerLost(worker) if lost else Failed(task))
    assert simulation.stopped == Stop(complete=False)
    if not lost:
        assert simulation.scheduler.state(task) is State.FAILED
    for other in sorted(set(simulation.running) - {task}):
        assert simulation.scheduler.handle(Finished(other)) == []


@settings(deadline=None)
@given(graphs())
def test_the_same_events_give_the_same_instructions(graph: tuple[list[Node], int]) -> None:
    nodes, workers = graph
    first, second = Simulation(nodes, workers), Simulation(nodes, workers)
    first.send(Started())
    second.send(Started())
    while first.running:
        task = sorted(first.running)[-1]
        first.send(Finished(task))
        second.send(Finished(task))
        assert first.running == second.running
    assert first.order == second.order


def node(
    name: str, *after: str, worker: int | None = None, cost: float = 0.0, reads: str = ""
) -> Node:
    inputs = tuple((source, 0) for source in reads.split())
    return Node(id=name, task=TASK, worker=worker, after=after, inputs=inputs, cost=cost)


def test_nothing_to_do_is_done_at_once() -> None:
    assert Scheduler([], 2).handle(Started()) == [Stop(complete=True)]


def test_a_worker_does_first_what_only_it_can_do() -> None:
    nodes = [node("any", cost=9.0), node("mine", worker=0), node("yours", worker=1)]
    scheduler = Scheduler(nodes, 2)
    assert scheduler.handle(Started()) == [Run("mine", 0), Run("yours", 1)]
    assert scheduler.handle(Finished("yours")) == [Run("any", 1)]


def test_the_dearest_goes_first_and_equals_go_in_the_order_of_the_graph() -> None:
    nodes = [node("b"), node("a"), node("dear", cost=5.0), node("dearer", cost=6.0)]
    scheduler = Scheduler(nodes, 1)
    assert scheduler.handle(Started()) == [Run("dearer", 0)]
    started = [scheduler.handle(Finished(task)) for task in ("dearer", "dear", "b")]
    assert started == [[Run("dear", 0)], [Run("b", 0)], [Run("a", 0)]]


def test_parts_go_with_their_last_reader() -> None:
    nodes = [node("made"), node("r1", reads="made"), node("r2", reads="made made")]
    scheduler = Scheduler([*nodes, node("end", "r1", "r2")], 2)
    assert scheduler.handle(Started()) == [Run("made", 0)]
    assert scheduler.handle(Finished("made")) == [Run("r1", 0), Run("r2", 1)]
    assert scheduler.handle(Finished("r2")) == []
    assert scheduler.handle(Finished("r1")) == [Release("made"), Run("end", 0)]
    assert scheduler.handle(Finished("end")) == [Stop(complete=True)]


def test_the_last_parts_are_released_before_the_end() -> None:
    scheduler = Scheduler([node("made"), node("reader", reads="made")], 1)
    scheduler.handle(Started())
    scheduler.handle(Finished("made"))
    assert scheduler.handle(Finished("reader")) == [Release("made"), Stop(complete=True)]


@pytest.mark.parametrize(
    "nodes", [[node("a"), node("a")], [node("a", "b")], [node("a", reads="b")]]
)
def test_a_graph_that_makes_no_sense_is_a_bug(nodes: list[Node]) -> None:
    with pytest.raises(AssertionError):
        Scheduler(nodes, 1)


def test_tasks_that_wait_for_each_other_are_a_bug() -> None:
    scheduler = Scheduler([node("a", "b"), node("b", "a")], 1)
    with pytest.raises(AssertionError, match="none can run"):
        scheduler.handle(Started())


@pytest.mark.parametrize("event", [Finished("b"), Failed("b"), Finished("nobody")])
def test_an_event_out_of_turn_is_a_bug(event: Event) -> None:
    scheduler = Scheduler([node("a"), node("b", "a")], 1)
    scheduler.handle(Started())
    with pytest.raises(KeyError):
        scheduler.handle(event)
