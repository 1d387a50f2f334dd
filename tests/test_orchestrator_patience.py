"""When a worker that does not die is given up, by the clock alone."""

import pytest

from orchestrator import patience
from orchestrator.patience import FETCH_TIMEOUT_S, Judge, OwnTime, Patience
from orchestrator.scheduler import MOST_LOSSES, Assignment
from tests.samples import plan
from workers.store import STORE_PATIENCE_S
from workers.tasks import Collect, CopyOutside, Publish, Solve, Survey, Task

PATIENCE = Patience(silent_s=10.0, shortest_s=100.0, times_usual=20.0)


def _assignment(task: Task, inputs: int = 0) -> Assignment:
    return Assignment(id="it", task=task, inputs=(("from", 0),) * inputs)


def _judge(*finished: tuple[Task, float]) -> Judge:
    judge = Judge(plan(4), PATIENCE)
    for task, seconds in finished:
        judge.finished(_assignment(task), seconds)
    return judge


def _collect(block: int, chunks: int) -> Collect:
    return Collect(block, tuple(range(chunks)), (1, 1, 1, 1))


def test_a_task_is_given_up_at_twenty_times_the_longest_of_its_kind() -> None:
    judge = _judge((_collect(0, 2), 10.0), (_collect(1, 2), 4.0))
    task = _assignment(_collect(2, 2))
    assert judge.slow(task, 200.0) is None
    assert judge.slow(task, 201.0) == "it hangs: 201 s at it, where 10.0 s were the longest"


def test_more_chunks_are_given_more_time_and_fewer_no_less() -> None:
    judge = _judge((_collect(0, 2), 10.0))
    assert judge.slow(_assignment(_collect(1, 8)), 799.0) is None
    assert judge.slow(_assignment(_collect(1, 8)), 801.0)
    assert judge.slow(_assignment(_collect(1, 1)), 199.0) is None


def test_short_tasks_are_given_the_least_time_there_is() -> None:
    judge = _judge((_collect(0, 2), 0.1))
    assert judge.slow(_assignment(_collect(1, 2)), 99.0) is None
    assert judge.slow(_assignment(_collect(1, 2)), 101.0)


@pytest.mark.parametrize(
    ("seen", "task"),
    [
        (None, _collect(0, 1)),
        (Publish(0, 1), _collect(0, 1)),
        (Survey(("a",)), Survey(("b", "c"))),
        (CopyOutside(1), CopyOutside(1)),
        (Solve(0, 0, ((0, 0),)), Solve(0, 3, ((0, 0),))),  # 2,048 inputs, and 5,632
    ],
)
def test_what_nothing_is_comparable_with_is_waited_for(seen: Task | None, task: Task) -> None:
    judge = _judge(*([(seen, 1.0)] if seen else []))
    assert judge.slow(_assignment(task), 1e9) is None


def test_linears_of_one_width_are_comparable_from_block_to_block() -> None:
    judge = _judge((Solve(0, 0, ((0, 0),)), 10.0))
    assert judge.slow(_assignment(Solve(3, 1, ((0, 0),))), 201.0)


def test_blocks_of_another_shape_are_not_compared() -> None:
    kept = {"scheme": "int4", "overrides": [{"match": "model.layers.1.*.down_proj", "skip": True}]}
    judge = Judge(plan(4, quantization=kept), PATIENCE)
    judge.finished(_assignment(_collect(0, 1)), 1.0)
    assert judge.slow(_assignment(_collect(1, 1)), 1e9) is None
    assert judge.slow(_assignment(_collect(2, 1)), 101.0)


def test_what_a_task_may_wait_for_itself_is_not_held_against_it() -> None:
    judge = _judge((Publish(0, 1), 1.0))
    waits = FETCH_TIMEOUT_S + STORE_PATIENCE_S
    assert judge.slow(_assignment(Publish(1, 1), inputs=2), waits + 100.0) is None
    assert judge.slow(_assignment(Publish(1, 1), inputs=2), 1e5)


def test_a_slow_step_is_given_more_and_more_before_it_ends_a_job() -> None:
    judge = _judge((_collect(0, 1), 1.0))
    task, other = _assignment(_collect(1, 1)), _assignment(_collect(2, 1))
    limits = []
    for _ in range(MOST_LOSSES):
        limits.append(next(s for s in range(0, 10**5, 10) if judge.slow(task, s + 1.0)))
        judge.gave_up(task)
    assert limits == [100, 400, 1600, 6400]
    assert judge.slow(other, 101.0)  # the next block begins anew


def test_silence_is_given_up_whatever_the_task() -> None:
    judge = _judge()
    survey = _assignment(Survey(("a",)))
    assert judge.silent(survey, 10.0) is None
    assert judge.silent(survey, 11.0) == "it does not answer: 11 s of silence at it"
    assert judge.silent(None, 11.0) == "it does not answer: 11 s of silence"
    judge.gave_up(survey)
    assert judge.silent(survey, 11.0) is None


def test_a_driver_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 3601.0, 3601.5])
    monkeypatch.setattr(patience.time, "monotonic", lambda: next(clock))
    own = OwnTime()
    assert [own.now() for _ in range(4)] == [0.5, 1.0, 6.0, 6.5]
