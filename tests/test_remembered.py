"""What is remembered between commands: texts as token ids, and what models consist of."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checks import check
from orchestrator.to_plan import check_to_plan
from quantcore.autoquant import race
from quantcore.errors import JobFaults
from tests.command import quantfleet
from tests.conftest import ARCHITECTURES, TEXT
from tests.planning import EFFORT
from workers import remembered
from workers.architecture import inspect
from workers.inspected import architecture_of
from workers.remembered import Memory, cache_folder
from workers.sources import folder as folders
from workers.sources import open_source

JobFile = Callable[..., Path]
PlanJob = Callable[..., Path]

_SECOND_PLAN = """
import sys
from functools import partial
from orchestrator.cli import app
from quantcore.autoquant import race
race.Effort = partial(race.Effort, seconds=0.02)
try:
    app(["plan", sys.argv[1], "--in-process", "--json"])
except SystemExit as ended:
    assert not ended.code, ended
loaded = {"transformers", "tokenizers", "torch._dynamo", "ray", "lm_eval"} & sys.modules.keys()
assert not loaded, loaded
"""


def refuse(*_: Any) -> Any:
    raise AssertionError("worked out again")


def forget_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "load_tokenizer", refuse)
    monkeypatch.setattr(folders, "load_config", refuse)


@pytest.fixture
def model(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """One that a test may change."""
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def own_job(job_file: JobFile, model: Path, text: Path) -> Path:
    calibration = {"text": str(text), "sequences": 8, "length": 32}
    return job_file(model={"path": str(model)}, calibration=calibration)


def entries(kind: str = "") -> list[Path]:
    return sorted(cache_folder().glob(f"{kind}*"))


def test_a_second_plan_tokenizes_nothing_and_loads_neither_tokenizer_nor_compiler(
    job_to_plan: PlanJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "Effort", lambda: EFFORT)
    held_out, calls = tmp_path / "held-out.txt", [{"tokens": 1}]
    held_out.write_text(TEXT.replace("whale", "shark"))
    job = job_to_plan(held_out=str(held_out), rounding="rtn", calls=calls, end_to_end=False)
    first = quantfleet("plan", job, "--in-process", "--json")
    assert first.code == 0, first
    (facts,) = json.loads(first.out)["plans"]
    document = Path(facts["store"]).read_bytes()
    assert len(entries("tokens-")) == 2
    with monkeypatch.context() as without:
        forget_how(without)
        second = quantfleet("plan", job, "--in-process", "--json")
    assert second.code == 0, second
    assert Path(facts["store"]).read_bytes() == document
    command = [sys.executable, "-c", _SECOND_PLAN, str(job)]
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root}
    third = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert Path(facts["store"]).read_bytes() == document


@pytest.mark.parametrize("name", [*ARCHITECTURES, "olmo2", "cohere", "stablelm", "gpt2"])
def test_a_model_is_remembered_as_it_was_inspected(
    name: str, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, memory = open_source(model_folder(name)), Memory()
    found = inspect(source)
    assert architecture_of(source, memory) == found
    forget_how(monkeypatch)
    assert architecture_of(open_source(model_folder(name)), memory) == found
    assert memory.warnings == []


def test_other_windows_of_the_same_text_tokenize_nothing(
    job_file: JobFile, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = check(job_file())
    calibration = {"text": str(text_file), "sequences": 5, "length": 40, "seed": 3}
    other = job_file("other", calibration=calibration)
    with monkeypatch.context() as without:
        forget_how(without)
        remembered_windows = check(other).plan.tokens
        assert check(job_file()).tokens_digest == one.tokens_digest
    shutil.rmtree(cache_folder())
    anew = check(other).plan.tokens
    assert anew is not None
    assert remembered_windows is not None
    assert (anew == remembered_windows).all()


def _other_text(model: Path, text: Path) -> None:
    text.write_text(TEXT[:-400] + TEXT[-400:].replace("whale", "shark"))


def _other_tokenizer(model: Path, text: Path) -> None:
    told = json.loads((model / "tokenizer.json").read_text())
    told["model"]["merges"] = told["model"]["merges"][:-20]
    (model / "tokenizer.json").write_text(json.dumps(told))


@pytest.mark.parametrize("change", [_other_text, _other_tokenizer])
def test_another_text_or_tokenizer_is_noticed_though_its_size_and_time_are_the_same(
    change: Callable[[Path, Path], None], own_job: Path, model: Path, text: Path
) -> None:
    before = check(own_job)
    times = {path: path.stat().st_mtime_ns for path in [text, *model.iterdir()]}
    change(model, text)
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    after = check(own_job)
    assert after.tokens_digest != before.tokens_digest
    shutil.rmtree(cache_folder())
    assert check(own_job).tokens_digest == after.tokens_digest


def test_another_config_over_the_same_weights_is_noticed(own_job: Path, model: Path) -> None:
    assert check(own_job).architecture.attention.heads == 4
    config = json.loads((model / "config.json").read_text())
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    (model / "config.json").write_text(json.dumps({**config, **heads}))
    assert check(own_job).architecture.attention.heads == 8
    (model / "config.json").write_text(json.dumps({**config, "model_type": "no-such"}))
    with pytest.raises(JobFaults, match=r"config\.json does not load"):
        check(own_job)


def test_other_packages_work_it_out_anew(own_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(own_job)
    monkeypatch.setattr(remembered, "version_of", lambda package: f"another {package}")
    check(own_job)
    assert (len(entries("tokens-")), len(entries("model-"))) == (2, 2)


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-1],
    "a bit": lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:],
    "something else": lambda data: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("kind", ["tokens", "model"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_entry_is_named_and_made_anew(
    damage: str, kind: str, own_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = check(own_job)
    (entry,) = entries(f"{kind}-")
    whole = entry.read_bytes()
    entry.write_bytes(_DAMAGE[damage](whole))
    told = check(own_job)
    assert len(told.notes) == 1
    assert told.notes[0].startswith(f"{entry} is ignored: damaged (")
    assert (told.tokens_digest, told.architecture) == (before.tokens_digest, before.architecture)
    assert entry.read_bytes() == whole
    forget_how(monkeypatch)
    assert check(own_job).notes == ()


def test_a_damaged_entry_is_told_by_plan_and_run(job_to_plan: PlanJob, job_file: JobFile) -> None:
    for command, job in (("check", job_file("one")), ("run", job_file("two"))):
        check(job)
        entries("tokens-")[0].write_bytes(b"")
        outcome = quantfleet(command, job, *(["--in-process"] if command == "run" else []))
        assert outcome.code == 0, outcome
        assert "is ignored: damaged (not what was written): made anew" in outcome.out + outcome.err
    entries("tokens-")[0].write_bytes(b"")
    assert any("is ignored: damaged" in note for note in check_to_plan(job_to_plan("three")).notes)


def test_a_place_that_cannot_be_written_is_named_once(own_job: Path) -> None:
    cache_folder().parent.mkdir(parents=True)
    cache_folder().write_text("no folder")
    note, *others = (note for note in check(own_job).notes if "nothing is remembered" in note)
    assert note.startswith("nothing is remembered in XDG_CACHE_HOME: ")
    assert not others


def test_the_oldest_in_use_go_once_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_MOST_BYTES", 3 * 165)
    monkeypatch.setattr(remembered, "_MOST_ENTRY_BYTES", 100)
    memory = Memory(tmp_path)
    for number in range(3):
        memory.keep(f"entry-{number}", bytes([number]) * 100)
        os.utime(tmp_path / f"entry-{number}", ns=(number, number))
    assert memory.recall("entry-0", bytes) == bytes(100)  # the newest in use from now on
    memory.keep("entry-3", bytes(100))
    memory.keep("entry-4", bytes(101))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry-0", "entry-2", "entry-3"]
    assert memory.recall("entry-1", bytes) is None
    assert memory.warnings == []


def test_files_of_a_model_in_a_bucket_are_known_by_their_versions(
    upload: Callable[..., str], model: Path, text: Path
) -> None:
    url = upload(model)
    before = open_source(url).made_of()
    assert open_source(url).made_of() == before
    _other_tokenizer(model, text)
    assert open_source(upload(model)).made_of() != before


def test_help_and_usage_import_no_torch() -> None:
    told = "import sys; import orchestrator.cli; assert 'torch' not in sys.modules"
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", told], cwd=root, check=True)
