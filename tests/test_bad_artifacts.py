"""What stands in a store is believed only as far as it can be checked."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import quantfleet, quantfleet_process, snapshot

_JOB: dict[str, Any] = {
    "quantization": {"scheme": "int4", "group_size": 32, "method": "gptq"},
    "calibration": {"sequences": 8, "length": 32},
    "workers": {"count": 1},
}
_FILES = {
    "model/config.json": b"{}",
    "model/[/red].txt": b"markup, to some",
    "model/sub/x.bin": b"weights",
    "report/report.json": b"{}",
}


def _manifest(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "version": 1,
        "job": "job",
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in files.items()
        },
    }


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A finished job, as far as fetch looks at one."""
    root = tmp_path / "store" / "job"
    for name, data in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "manifest.json").write_text(json.dumps(_manifest(_FILES)))
    return root


def _refused(folder: Path, code: int, *args: str | Path, verified: int = 0) -> str:
    """Run a command that must be refused in one line and change nothing below the folder.

    Before that it may say of so many files that they are verified.
    """
    before = snapshot(folder)
    outcome = quantfleet(*args)
    assert (outcome.code, outcome.out) == (code, ""), outcome
    *before_that, message = outcome.err.splitlines()
    assert [line.split()[0] for line in before_that] == ["verified"] * verified, outcome.err
    assert snapshot(folder) == before
    return message


def test_fetch_takes_what_the_manifest_names_and_nothing_else(store: Path, tmp_path: Path) -> None:
    (store / "model" / "stray").write_bytes(b"not in the manifest")
    out = tmp_path / "new" / "out[a]"
    outcome = quantfleet("fetch", store, out)
    assert outcome.code == 0
    assert outcome.out == f"{out}: 4 files, 0.0 MB, all verified\n"
    assert outcome.err.splitlines() == [f"verified {name}" for name in _FILES]
    manifest = (store / "manifest.json").read_bytes()
    files = {name.removeprefix("model/"): data for name, data in _FILES.items()}
    fetched = {name: data for name, data in snapshot(out).items() if data is not None}
    assert fetched == {**files, "manifest.json": manifest}


@pytest.mark.parametrize("change", [b"", b"weightz", b"weights and more"])
def test_a_file_that_does_not_match_its_hash_is_refused(
    store: Path, tmp_path: Path, change: bytes
) -> None:
    (store / "model" / "sub" / "x.bin").write_bytes(change)
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "new" / "out", verified=2)
    assert "model/sub/x.bin does not match its hash in the manifest" in said


def test_a_file_that_is_gone_is_refused(store: Path, tmp_path: Path) -> None:
    (store / "model" / "sub" / "x.bin").unlink()
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "new" / "out", verified=2)
    assert "cannot access 'model/sub/x.bin'" in said


def test_a_process_of_its_own_refuses_too(store: Path, tmp_path: Path) -> None:
    (store / "model" / "sub" / "x.bin").write_bytes(b"weightz")
    before = snapshot(tmp_path)
    outcome = quantfleet_process("fetch", "--json", store, tmp_path / "out")
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (3, "", 1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "../escaped",
        "model/../../escaped",
        "model/..",
        "/tmp/escaped",
        "model//tmp/escaped",
        "model\\escaped",
        "..\\escaped",
        "",
        "model/",
        "model/./x",
    ],
)
def test_a_name_that_leads_out_is_refused(store: Path, tmp_path: Path, name: str) -> None:
    for place in (store, tmp_path, store / "model"):  # the file is there, wherever it is looked for
        (place / "escaped").write_bytes(b"x")
    (store / "manifest.json").write_text(json.dumps(_manifest({**_FILES, name: b"x"})))
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "out")
    assert said.startswith(f"error: the file name '{name}' leads out of its folder")


@pytest.mark.parametrize("name", ["model/report/report.json", "model/manifest.json"])
def test_two_files_for_one_place_are_refused(store: Path, tmp_path: Path, name: str) -> None:
    (store / "manifest.json").write_text(json.dumps(_manifest({**_FILES, name: b"x"})))
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "out")
    assert "puts two files in one place" in said


def test_a_file_that_is_also_a_folder_is_refused(store: Path, tmp_path: Path) -> None:
    (store / "sub").write_bytes(b"x")
    (store / "manifest.json").write_text(json.dumps(_manifest({"sub": b"x", **_FILES})))
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "out", verified=3)
    assert "cannot write to " in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"files": [1]}',
        '{"files": {"a": {"sha256": 1, "size": 1}}}',
        '{"files": {"a": {"sha256": "x", "size": "1"}}}',
        '{"files": {"a": null}}',
        "\xff",
    ],
)
def test_what_is_no_manifest_is_refused(store: Path, tmp_path: Path, text: str) -> None:
    (store / "manifest.json").write_bytes(text.encode("latin-1"))
    said = _refused(tmp_path, 3, "fetch", store, tmp_path / "out")
    assert said.endswith("manifest.json is not a manifest of quantfleet")


def test_fetch_into_a_folder_that_holds_something_is_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert quantfleet("fetch", store, out).code == 0  # an empty one will do
    said = _refused(tmp_path, 2, "fetch", store, out)
    assert said == f"error: {out} is there already: name a new folder, or an empty one"
    said = _refused(tmp_path, 2, "fetch", store, out / "config.json")
    assert "config.json is there already" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("status", "holds no job: see quantfleet list"),
        ("resume", "holds no job that was begun: see quantfleet list"),
        ("fetch", "has no manifest.json: the job is not finished there (see quantfleet status)"),
    ],
)
def test_a_job_that_is_not_there_is_named(tmp_path: Path, command: str, message: str) -> None:
    more = [tmp_path / "out"] if command == "fetch" else []
    said = _refused(tmp_path, 3, command, tmp_path / "nope", *more)
    assert said == f"error: {tmp_path / 'nope'} {message}"


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"identity": {}, "spec": {}}',
        '{"identity": {}, "spec": {}, "blocks": 1}',
        '{"identity": {}, "spec": [], "blocks": 1}',
        '{"identity": {}, "spec": {"name": 1, "quantization": {"scheme": "x"}}, "blocks": 1}',
    ],
)
@pytest.mark.parametrize("command", ["status", "resume"])
def test_what_is_no_job_record_is_refused(tmp_path: Path, command: str, record: str) -> None:
    job = tmp_path / "store" / "job"
    (job / "ledger").mkdir(parents=True)
    (job / "ledger" / "job.json").write_text(record)
    said = _refused(tmp_path, 3, command, job)
    assert said == f"error: {job}/ledger/job.json is not a job record"


Begun = tuple[Path, Path]


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], text_file: Path
) -> Begun:
    """A job that was begun and not finished: its folder, and a model of its own."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(model_folder("llama"), folder / "model")
    shutil.copyfile(text_file, folder / "text.txt")
    _write(folder)
    assert quantfleet("run", "--in-process", "--json", folder / "job.yaml").code == 0
    store = folder / "store" / "job"
    (store / "manifest.json").unlink()
    (store / "ledger" / "block-00002.json").unlink()
    return folder, store


def _write(folder: Path, **changes: dict[str, Any]) -> Path:
    job = {key: {**section, **changes.get(key, {})} for key, section in _JOB.items()}
    job["calibration"] = {"text": "text.txt", **job["calibration"]}
    job |= {"model": {"path": "model"}, "output": {"store": "store"}, "compute_dtype": "float32"}
    job |= {key: value for key, value in changes.items() if key not in _JOB}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("quantization.scheme", {"quantization": {"scheme": "int8"}}),
        ("quantization.group_size", {"quantization": {"group_size": 64}}),
        ("quantization.method", {"quantization": {"method": "rtn"}}),
        ("quantization.gptq.damping", {"quantization": {"gptq": {"damping": 0.02}}}),
        (
            "quantization.overrides",
            {"quantization": {"overrides": [{"match": "*.o_proj", "skip": True}]}},
        ),
        ("calibration.sequences", {"calibration": {"sequences": 4}}),
        ("calibration.length", {"calibration": {"length": 16}}),
        ("calibration (token ids)", {"calibration": {"seed": 1}}),
        ("calibration (token ids)", {"calibration": {"max_characters": 9000}}),
        ("workers.threads", {"workers": {"threads": 2}}),
        ("compute_dtype", {"compute_dtype": "bfloat16"}),
    ],
)
def test_a_job_that_was_begun_otherwise_is_refused(
    begun: Begun, field: str, changes: dict[str, Any]
) -> None:
    folder, store = begun
    job = _write(folder, **changes)
    said = _refused(folder, 2, "run", "--in-process", "--json", job)
    where = re.escape(f"{field}: this job was begun at {store} with ")
    assert re.fullmatch(rf"error: {where}.* and now it says .*: put it back, or choose.*", said)


def test_other_weights_under_the_same_names_are_refused(
    begun: Begun, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(begun[0], tmp_path / "begun")
    weights = folder / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    said = _refused(folder, 2, "run", "--in-process", "--json", _write(folder))
    assert said.startswith("error: model (content): this job was begun at ")


def test_what_decides_no_bits_may_change(begun: Begun, tmp_path: Path) -> None:
    folder = shutil.copytree(begun[0], tmp_path / "begun")
    job = _write(folder, workers={"count": 2})
    assert quantfleet("run", "--in-process", "--json", job).code == 0
    assert (folder / "store" / "job" / "manifest.json").is_file()


def test_a_job_that_was_moved_is_resumed_where_it_is(begun: Begun, tmp_path: Path) -> None:
    before = snapshot(begun[0])
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(begun[1], moved)
    outcome = quantfleet("resume", "--in-process", "--json", moved)
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["store"] == str(moved)
    assert (moved / "manifest.json").is_file()
    assert snapshot(begun[0]) == before
