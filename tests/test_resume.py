"""A job that is killed or interrupted under Ray goes on from its store to the same bytes."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.command import finish, quantfleet, snapshot, start, wait_for

_BLOCKS = 24  # enough that a job is far from its end when its first block is seen


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], text_file: Path
) -> Path:
    """A folder with a deeper model, and `whole`: the store of a job that nothing disturbed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    site = tmp_path_factory.mktemp("resume")
    shutil.copytree(model_folder("llama"), site / "model")
    config = AutoConfig.from_pretrained(site / "model", num_hidden_layers=_BLOCKS)
    AutoModelForCausalLM.from_config(config).save_pretrained(site / "model")
    shutil.copyfile(text_file, site / "text.txt")
    assert quantfleet("run", "--in-process", _job(site, "whole")).code == 0
    return site


def _job(site: Path, store: str) -> Path:
    job = {
        "name": "job",
        "model": {"path": "model"},
        "quantization": {"scheme": "int4", "group_size": 32, "method": "gptq"},
        "calibration": {"text": "text.txt", "sequences": 8, "length": 32},
        "workers": {"count": 1},
        "output": {"store": store},
    }
    path = site / f"{store}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _model_bytes(site: Path, store: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (site / store / "job" / "model").iterdir()}


def _records(site: Path, store: str) -> list[Path]:
    return list((site / store / "job" / "ledger").glob("block-*.json"))


@contextmanager
def _run_until(
    site: Path, store: str, records: int
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """`quantfleet run` with Ray, stopped at so many finished blocks, and the processes below it.

    A signal that it is sent then is heard when it is let go on. Its children die with the test.
    """
    process = start("run", _job(site, store))
    children: list[psutil.Process] = []
    try:
        wait_for(lambda: len(_records(site, store)) >= records, process)
        process.send_signal(signal.SIGSTOP)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in children)
        yield process, children
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.communicate()
        for child in children:
            if child.is_running():  # psutil compares start times: never another's process
                child.kill()
        psutil.wait_procs(children, timeout=60)


@pytest.fixture(scope="module")
def killed(site: Path) -> Path:
    """The store of a job whose driver was killed after a block or more."""
    with _run_until(site, "killed", 1) as (process, _):
        process.send_signal(signal.SIGKILL)
        assert finish(process).code == -signal.SIGKILL
    assert 1 <= len(_records(site, "killed")) < _BLOCKS
    assert not (site / "killed" / "job" / "manifest.json").exists()
    return site / "killed"


def test_a_killed_job_runs_again_to_the_same_bytes(site: Path, killed: Path) -> None:
    shutil.copytree(killed, site / "again")
    (site / "again/job/model/.new-5e").write_bytes(b"half")  # of a worker killed as it wrote
    before = {path.name: path.stat().st_mtime_ns for path in _records(site, "again")}
    assert quantfleet("run", "--in-process", _job(site, "again")).code == 0
    assert _model_bytes(site, "again") == _model_bytes(site, "whole")
    after = {path.name: path.stat().st_mtime_ns for path in _records(site, "again")}
    assert len(after) == _BLOCKS
    assert before.items() <= after.items()  # what was finished was not done again


def test_a_killed_job_is_resumed_from_its_store_alone(site: Path, killed: Path) -> None:
    """Even the texts that it was begun with are gone."""
    shutil.copytree(killed, site / "moved")
    began = site / "moved" / "job" / "ledger" / "job.json"
    began.write_text(began.read_text().replace("text.txt", "gone.txt"))
    done = len(_records(site, "moved"))
    outcome = quantfleet("resume", "--in-process", site / "moved" / "job")
    assert outcome.code == 0, outcome
    assert f"{done} of {_BLOCKS} blocks are finished: going on" in outcome.err
    assert _model_bytes(site, "moved") == _model_bytes(site, "whole")


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda n: n.name,
)
def test_an_interrupted_job_says_how_to_go_on(
    site: Path, killed: Path, number: signal.Signals
) -> None:
    """It goes on, under Ray, from what was killed, and is cut short once more."""
    store = number.name
    shutil.copytree(killed, site / store)
    done = len(_records(site, store))
    with _run_until(site, store, done + 1) as (process, children):
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        outcome = finish(process)
        _, left = psutil.wait_procs(children, timeout=60)
    assert outcome.code == 130, outcome
    assert left == []
    said = rf"(\d+) of {_BLOCKS} blocks are kept; go on with: quantfleet (.+)\ninterrupted\n$"
    advice = re.search(said, outcome.err)
    assert advice, outcome.err
    assert done < int(advice[1]) <= len(_records(site, store)) < _BLOCKS
    resumed = quantfleet(*shlex.split(advice[2]), "--in-process", "--json")
    assert resumed.code == 0, resumed
    assert json.loads(resumed.out)["store"] == str(site / store / "job")
    assert _model_bytes(site, store) == _model_bytes(site, "whole")


def test_of_two_drivers_one_goes_on(site: Path) -> None:
    process = start("run", _job(site, "two"))
    wait_for(lambda: len(_records(site, "two")) >= 1, process)
    second = quantfleet("run", "--in-process", _job(site, "two"))
    assert second.code == 3, second
    assert "another driver is at work" in second.err
    first = finish(process)
    assert first.code == 0, first
    assert _model_bytes(site, "two") == _model_bytes(site, "whole")


def _without_first_beat(files: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """The first driver may have been stopped while it wrote its own beat."""
    ledger = "job/ledger"
    own = (f"{ledger}/beat-000001.json", f"{ledger}/.new-")
    return {name: data for name, data in files.items() if not name.startswith(own)}


def test_a_driver_that_slept_finds_itself_replaced_and_writes_nothing_more(site: Path) -> None:
    """It is stopped, not ended: another one finishes its job, and then it wakes."""
    with _run_until(site, "slept", 1) as (process, _):
        second = quantfleet("run", "--in-process", _job(site, "slept"))
        assert second.code == 0, second
        assert "watching for" in second.err
        before = _without_first_beat(snapshot(site / "slept"))
        process.send_signal(signal.SIGCONT)
        first = finish(process)
    assert first.code == 3, first
    assert "another driver has taken" in first.err
    assert _without_first_beat(snapshot(site / "slept")) == before
    assert _model_bytes(site, "slept") == _model_bytes(site, "whole")
