"""Jobs whose workers are killed at any point end in the bytes of an undisturbed job."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor, Result
from orchestrator.loop import Observer
from orchestrator.scheduler import Assignment
from quantcore.errors import ResourceError, StoreError
from tests.conftest import BLOCKS
from tests.faults import Kill, KillingExecutor, schedule

JobFile = Callable[..., Path]
_DEEP = 7  # blocks


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, bytes]]:
    yield {}


def _model_bytes(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(store) / "model").iterdir())}


def _undisturbed(job_file: JobFile, whole: dict[str, bytes]) -> dict[str, bytes]:
    """The bytes to compare with, made once for all tests here."""
    if not whole:
        prepared = check(job_file("whole"))
        result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
        whole |= _model_bytes(result.store)
    return whole


@pytest.mark.parametrize("seed", range(20))
def test_a_job_survives_a_schedule_of_kills(
    job_file: JobFile, whole: dict[str, bytes], seed: int
) -> None:
    expected = _undisturbed(job_file, whole)
    executors: list[KillingExecutor] = []

    def start(plan):
        executors.append(KillingExecutor(plan, 2 + seed % 2, schedule(seed, BLOCKS)))
        return executors[0]

    result = run_job(check(job_file(f"seed-{seed}")), start, Observer())
    assert executors[0].killed, "no kill of this schedule met its point"
    assert _model_bytes(result.store) == expected


def test_the_only_worker_is_killed_and_another_comes(
    job_file: JobFile, whole: dict[str, bytes]
) -> None:
    kills = [Kill("Collect", block, False, "gone") for block in range(BLOCKS)]
    result = run_job(
        check(job_file("alone")), lambda plan: KillingExecutor(plan, 1, kills), Observer()
    )
    assert _model_bytes(result.store) == _undisturbed(job_file, whole)


def test_a_step_that_kills_every_worker_ends_the_job_and_keeps_what_is_done(
    job_file: JobFile, whole: dict[str, bytes]
) -> None:
    kills = [Kill("Collect", 2, False, "gone") for _ in range(9)]
    job = job_file("poisoned")
    with pytest.raises(ResourceError, match="killed"):
        run_job(check(job), lambda plan: KillingExecutor(plan, 2, kills), Observer())
    store = job.parent / "store" / "poisoned"
    assert len(list((store / "ledger").glob("block-*.json"))) == 2
    result = run_job(check(job), lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    assert _model_bytes(result.store) == _undisturbed(job_file, whole)


class _Joining(KillingExecutor):
    """One worker, and others that join while it works."""

    def __init__(self, plan) -> None:
        super().__init__(plan, 1, ())
        self._due = [8, 14, 20]


def test_workers_that_join_change_no_bit(job_file: JobFile, whole: dict[str, bytes]) -> None:
    executors = []

    def start(plan):
        executors.append(_Joining(plan))
        return executors[0]

    result = run_job(check(job_file("joined")), start, Observer())
    assert len(executors[0].present()) == 4
    assert _model_bytes(result.store) == _undisturbed(job_file, whole)


class _Dies(Observer):
    """Of an interrupt, when a block was published; notes what was done before."""

    def __init__(self, block: int | None = None) -> None:
        self.done: list[str] = []
        self._last = f"publish/{block}/"

    def finished(self, assignment: Assignment, result: Result) -> None:
        self.done.append(assignment.id)
        if assignment.id.startswith(self._last):
            raise KeyboardInterrupt


def _kept(store: Path) -> list[Path]:
    return sorted((store / "activations").glob("*"))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """Blocks enough for a pace to be known before the last ones begin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(model_folder("llama"), folder)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=_DEEP)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(job_file: JobFile, deep_model: Path) -> tuple[Path, Path]:
    """A job and its store, whose driver died late; losses are common."""
    job = job_file(
        "kept", model={"path": str(deep_model)}, workers={"count": 2, "losses_per_day": 1e9}
    )
    with pytest.raises(KeyboardInterrupt):
        run_job(check(job), lambda plan: InProcessExecutor(plan, ["cpu"] * 2), _Dies(_DEEP - 2))
    store = job.parent / "store" / "kept"
    assert _kept(store)
    return job, store


def test_a_job_goes_on_from_the_hidden_states_it_kept(
    job_file: JobFile, deep_model: Path, broken: tuple[Path, Path]
) -> None:
    job, store = broken
    observer = _Dies()
    result = run_job(check(job), lambda plan: InProcessExecutor(plan, ["cpu"]), observer)
    assert any(name.startswith("load/") for name in observer.done)
    assert not any(name.startswith("embed/") for name in observer.done)
    undisturbed = check(job_file("undisturbed", model={"path": str(deep_model)}))
    whole = run_job(undisturbed, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    assert _model_bytes(result.store) == _model_bytes(whole.store)
    assert _kept(store) == []  # of no use once there is an artifact


@pytest.mark.parametrize("damage", ["changed", "cut", "empty"])
def test_kept_states_that_were_damaged_are_not_believed(
    broken: tuple[Path, Path], damage: str
) -> None:
    job, store = broken
    for file in _kept(store):
        data = file.read_bytes()
        file.write_bytes({"changed": data[:-1] + b"?", "cut": data[:-9], "empty": b""}[damage])
    with pytest.raises(StoreError, match="is not what was kept: delete activations/"):
        run_job(check(job), lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
