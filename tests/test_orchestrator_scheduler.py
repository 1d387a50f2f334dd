"""The very scheduler of a job under every order of events: no clock, no executor, no tensor."""

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bag import Bag
from orchestrator.scheduler import MOST_LOSSES, Failed, Finished, Joined, Run, Scheduler, Stop
from orchestrator.works import quantization_works
from tests.fleet import Fleet
from tests.samples import plan
from workers.layout import OUTSIDE, block_key
from workers.plan import Plan
from workers.tasks import Collect, CopyOutside, Embed, Round

BLOCKS = 4


def sharded(shards: int) -> dict[str, Any]:
    return {"text": "/t", "sequences": 64, "length": 512, "shards": shards}


SKIPPED = {"scheme": "int4", "overrides": [{"match": "model.layers.1.*", "skip": True}]}
PLANS = {
    "gptq": plan(BLOCKS),
    "a block skipped": plan(BLOCKS, quantization=SKIPPED),
    "few chunks": plan(BLOCKS, calibration={"text": "/t", "sequences": 3, "length": 4096}),
    "two shards": plan(BLOCKS, calibration=sharded(2)),
    "a shard for each block": plan(BLOCKS, calibration=sharded(BLOCKS)),
    "rtn": plan(BLOCKS, quantization={"scheme": "int4", "method": "rtn"}, calibration=None),
}


def fleet(
    job: Plan,
    done: set[int] | None = None,
    losses_per_day: float = 0.0,
    kept: set[tuple[int, int]] | None = None,
) -> Fleet:
    done, kept = done or set(), kept or set()
    works = quantization_works(
        job,
        {block_key(block) for block in done},
        chunk_bytes=10**6,
        losses_per_day=losses_per_day,
        kept=kept,
    )
    return Fleet(job, works, done, kept=set(kept))


def run_to_the_end(site: Fleet) -> None:
    """Finish whatever was started first, until nothing is left."""
    steps = 0
    while site.stopped is None:
        busy = site.busy()
        assert busy, "nobody works, and the job is not at its end"
        site.finish(min(busy, key=lambda n: site.started.index(site.workers[n].doing.id)))
        steps += 1
        assert steps < 3000, "no end in sight"


def finish_at(site: Fleet, worker: int, pace: float) -> float:
    """Finish what a worker does, at so many seconds a chunk."""
    doing = site.workers[worker].doing
    assert doing is not None
    seconds = len(getattr(doing.task, "chunks", (0,))) * pace
    site.finish(worker, seconds)
    return seconds


def check_whole(site: Fleet) -> None:
    assert site.stopped == Stop(complete=True)
    assert sorted({*site.done, *site.published}) == list(range(BLOCKS))
    assert len(site.published) == BLOCKS - len(site.done)
    assert site.results == {}, "a result is kept that nobody will read"


@pytest.mark.parametrize("job", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16, 40])
def test_any_number_of_workers_ends_the_job(job: Plan, workers: int) -> None:
    site = fleet(job)
    site.join(workers)
    run_to_the_end(site)
    check_whole(site)


@st.composite
def kept_states(draw: st.DrawFn, job: Plan, done: set[int]) -> set[tuple[int, int]]:
    """What a driver may have kept before it died: inputs of blocks up to the first unfinished."""
    kept: set[tuple[int, int]] = set()
    for first, last in job.shard_ranges() if job.calibration else ():
        reached = min(set(range(first, last)) - done, default=last - 1)
        blocks = st.integers(first, reached)
        chunks = st.integers(0, job.contract.chunks - 1)
        kept |= draw(st.sets(st.tuples(blocks, chunks), max_size=20))
    return kept


@settings(deadline=None, max_examples=int(os.environ.get("QUANTFLEET_EXAMPLES", "300")))
@given(st.sampled_from(sorted(PLANS)), st.sets(st.integers(0, BLOCKS - 1)), st.data())
def test_no_order_of_events_loses_repeats_or_reorders_a_block(
    name: str, done: set[int], data: st.DataObject
) -> None:
    """Workers come, go with and without their results, and finish in any order at any pace."""
    job = PLANS[name]
    losses_per_day = data.draw(st.sampled_from([0.0, 1e3, 1e9]))
    site = fleet(job, done, losses_per_day, data.draw(kept_states(job, done)))
    speeds = st.sampled_from(data.draw(st.sampled_from([[1.0], [1e9, 3e9, 1e12, 5e14]])))
    site.join(data.draw(st.integers(1, 4)), data.draw(speeds))
    for _ in range(data.draw(st.integers(0, 60))):
        if site.stopped is not None:
            break
        choices = ["join"] if len(site.workers) < 6 else []
        choices += ["finish"] * 6 if site.busy() else []
        choices += ["lose"] if site.workers else []
        match data.draw(st.sampled_from(choices)):
            case "join":
                site.join(data.draw(st.integers(1, 2)), data.draw(speeds))
            case "lose":
                victim = data.draw(st.sampled_from(sorted(site.workers)))
                site.lose(victim, parts_kept=data.draw(st.booleans()))
            case "finish":
                worker = data.draw(st.sampled_from(sorted(site.busy())))
                site.finish(worker, data.draw(st.sampled_from([0.01, 1.0, 3.0, 50.0])))
    if site.stopped is None:
        site.join(speed=data.draw(speeds))
        run_to_the_end(site)
    if site.stopped == Stop(complete=False):
        assert max(site.losses.values()) >= MOST_LOSSES
    else:
        check_whole(site)


def test_a_task_that_ends_every_worker_ends_the_job() -> None:
    site = fleet(PLANS["gptq"])
    site.join(MOST_LOSSES + 3)
    lost = 0
    while site.stopped is None:
        collecting = [n for n in site.busy() if isinstance(site.workers[n].doing.task, Collect)]
        if collecting:
            site.lose(collecting[0], parts_kept=True)
            lost += 1
        else:
            site.finish(site.busy()[0])
    assert site.stopped == Stop(complete=False)
    assert lost == MOST_LOSSES


def test_losses_of_different_blocks_do_not_add_up() -> None:
    job = plan(12)
    site = Fleet(job, quantization_works(job, ()))
    site.join(2)
    lost = set()
    while site.stopped is None:
        worker = site.busy()[0]
        task = site.workers[worker].doing.task
        if isinstance(task, Collect) and task.block not in lost:
            lost.add(task.block)
            site.lose(worker, parts_kept=False)
            site.join()
        else:
            site.finish(worker)
    assert len(lost) == 12
    assert site.stopped == Stop(complete=True)


def test_a_worker_that_joins_takes_its_share_over() -> None:
    site = fleet(plan(12))
    site.join()
    while len(site.published) < 2:
        finish_at(site, site.busy()[0], pace=1.0)
    site.join()
    while len(site.published) < 5:
        for worker in site.busy():
            finish_at(site, worker, pace=1.0)
    held = [len(worker.held) for worker in site.workers.values()]
    assert held == [8, 8]


def test_chunks_go_to_the_faster_worker() -> None:
    """One worker is three times as fast: in the end it holds three quarters."""
    site = fleet(plan(30))
    site.join(2)
    clock = {0: 0.0, 1: 0.0}
    while len(site.published) < 15:
        worker = min(site.busy(), key=lambda n: clock[n])
        clock[worker] += finish_at(site, worker, pace=1.0 if worker == 0 else 3.0)
    assert [len(worker.held) for worker in site.workers.values()] == [12, 4]


def test_a_loss_costs_the_lost_chunks_alone() -> None:
    """The others' sums of the block in flight are not made again."""
    site = fleet(PLANS["gptq"])
    site.join(4)
    while len(site.published) < 2 or not site.busy():
        site.finish(site.busy()[0])
    while not any(isinstance(w.doing.task, Collect) for w in site.workers.values() if w.doing):
        site.finish(site.busy()[0])
    before = len(site.started)
    site.lose(3, parts_kept=False)
    run_to_the_end(site)
    again = [name for name in site.started[before:] if name.startswith("embed/")]
    assert len(again) <= 3
    check_whole(site)


def test_a_result_of_a_worker_already_given_up_is_put_away() -> None:
    scheduler = Scheduler([Bag({"a": CopyOutside(1)})])
    (run,) = scheduler.handle(Joined((0,)))
    assert isinstance(run, Run)
    assert [type(i).__name__ for i in scheduler.handle(Finished("earlier"))] == ["Release"]
    assert scheduler.handle(Failed("earlier")) == []
    assert scheduler.handle(Finished("a"))[-1] == Stop(complete=True)
    assert scheduler.handle(Finished("a")) == []


def test_a_failure_is_the_last_word() -> None:
    scheduler = Scheduler([Bag({"a": Round(0, 1), "b": Round(1, 1)})])
    scheduler.handle(Joined((0, 1)))
    assert scheduler.handle(Failed("a")) == [Stop(complete=False)]
    assert scheduler.handle(Finished("b")) == []


def test_a_job_with_nothing_left_stops_at_once() -> None:
    done = [OUTSIDE, *(block_key(block) for block in range(BLOCKS))]
    scheduler = Scheduler(quantization_works(PLANS["gptq"], done))
    assert scheduler.handle(Joined((0,))) == [Stop(complete=True)]


def test_a_resumed_job_catches_up_before_it_collects() -> None:
    site = fleet(PLANS["gptq"], {0, 1})
    site.join(2)
    run_to_the_end(site)
    kinds = [name.partition("/")[0] for name in site.started]
    assert kinds[:2] == ["embed", "embed"]
    assert kinds[2:6] == ["advance"] * 4
    assert kinds[6:8] == ["collect"] * 2
    check_whole(site)


def test_kept_states_bound_the_replay() -> None:
    """With losses expected all the time every block's inputs are kept, and nothing older."""
    job = plan(12)
    site = fleet(job, losses_per_day=1e9)
    site.join(2)
    while len(site.published) < 8:
        finish_at(site, site.busy()[0], pace=1.0)
    blocks = {block for block, _ in site.kept}
    assert blocks <= {6, 7, 8}
    before = len(site.started)
    site.lose(0, parts_kept=False)
    run_to_the_end(site)
    again = site.started[before:]
    assert any(name.startswith("load/") for name in again)
    assert not any(name.startswith("embed/") for name in again)
    assert site.stopped == Stop(complete=True)


def test_without_losses_nothing_is_kept() -> None:
    site = fleet(plan(12), losses_per_day=0.0)
    site.join(2)
    run_to_the_end(site)
    assert not any(name.startswith("keep/") for name in site.started)


def test_first_chunks_are_dealt_evenly() -> None:
    scheduler = Scheduler(quantization_works(PLANS["gptq"], ()))
    runs = scheduler.handle(Joined((0, 1, 2)))
    embeds = [run.assignment.task for run in runs if isinstance(run, Run)]
    assert all(isinstance(task, Embed) for task in embeds)
    assert sorted(len(task.chunks) for task in embeds) == [5, 5, 6]
