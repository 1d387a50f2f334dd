"""Models in object storage that are refused, or change, each in one line."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from quantcore.errors import SourceError
from workers.sources import open_source, remote
from workers.store import open_store

JobFile = Callable[..., Path]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _truncated(model: Path) -> None:
    data = (model / _WEIGHTS).read_bytes()
    (model / _WEIGHTS).write_bytes(data[:-100])


def _index_of(file: str) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        weight_map = dict.fromkeys(load_file(model / _WEIGHTS), _WEIGHTS)
        weight_map["model.norm.weight"] = file
        (model / _INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def _twice(model: Path) -> None:
    weight_map = dict.fromkeys(load_file(model / _WEIGHTS), _WEIGHTS)
    save_file({"model.norm.weight": torch.ones(64)}, model / "other.safetensors")
    weight_map["model.norm.weight"] = "other.safetensors"
    (model / _INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(data) and None


_WHOLE = f"/models/it/{_WEIGHTS} is not a whole safetensors file: .* Upload it again"
_BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncated, _WHOLE),
    "empty": (_written(_WEIGHTS, b""), _WHOLE),
    "header longer than the file": (_written(_WEIGHTS, b"\xff\xff\xff\x01\0\0\0\0{}"), _WHOLE),
    "header beyond every limit": (_written(_WEIGHTS, b"\xff" * 8 + b"{}"), "over safetensors' lim"),
    "header of brackets": (
        _written(_WEIGHTS, struct.pack("<Q", 300_000) + b"[" * 300_000),
        "nested too deeply",
    ),
    "index that leaves its folder": (_index_of("../x.safetensors"), "names a file outside its fol"),
    "index that names /": (_index_of("/etc/x"), "names a file outside its folder: '/etc/x'"),
    "index that names a missing file": (_index_of("no.safetensors"), "names no.safetensors, which"),
    "index of brackets": (_written(_INDEX, b"[" * 300_000), "is not a safetensors index"),
    "index that is no text": (_written(_INDEX, b"\xff\xff"), "is not a safetensors index"),
    "tensor that stands twice": (_twice, "'model.norm.weight' stands twice: in model.safetensors"),
    "config that is no JSON": (_written("config.json", b"{"), "/config.json does not load: "),
    "config beyond every limit": (
        _written("config.json", b" " * (17 << 20)),
        "config.json has 17 MiB, over 16: it is no file of a model's",
    ),
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda model: (model / _WEIGHTS).unlink(), f"has neither {_WEIGHTS} nor"),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_bad_model_is_refused(
    case: str,
    tmp_path: Path,
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    job_file: JobFile,
    refused: Callable[..., str],
) -> None:
    edit, message = _BAD[case]
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    edit(folder)
    said = refused(3, "run", job_file(model={"path": upload(folder)}))
    assert re.search(rf"\.yaml:\d+:3: model.path: .*{message}", said), said


@pytest.mark.parametrize("name", ["a/../../../../up.txt", "/up.txt", "a//up.txt", "a\\up.txt"])
def test_nothing_in_a_bucket_leads_out_of_a_folder(
    name: str,
    bucket: str,
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    import boto3

    source = open_source(upload(model_folder("llama")))
    boto3.client("s3").put_object(
        Bucket=bucket.removeprefix("s3://"), Key=f"models/it/{name}", Body=b"x"
    )
    source = open_source(str(source.path))
    if ".." in name:  # as hidden files are
        assert "up.txt" not in str(source.write_companions(tmp_path))
    else:
        with pytest.raises(SourceError, match="leads out of its folder: refused"):
            source.write_companions(tmp_path)
    assert not list(tmp_path.parent.rglob("up.txt"))


def test_too_much_beside_the_weights_is_not_fetched(
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    (folder / "dump.tar").write_bytes(bytes(1 << 20))
    url = upload(folder)
    monkeypatch.setattr(remote, "_MOST_SMALL_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"over 1 MiB of files .*, most of it dump\.tar: keep"):
        open_source(url).tokenizer()
    monkeypatch.setattr(remote, "_MOST_FILES", 3)
    with pytest.raises(SourceError, match="holds over 3 files: name the folder of one model"):
        open_source(url)


@pytest.mark.parametrize("when", ["before the survey", "after the survey"])
def test_a_model_that_changes_while_a_job_runs_ends_it_in_one_line(
    when: str,
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    job_file: JobFile,
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    prepared = check(job_file(model={"path": upload(folder)}))
    tensors = load_file(folder / _WEIGHTS)
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    class Changing(Observer):
        def note(self, event: str, **facts: Any) -> None:
            if event == {"b": "workers starting", "a": "quantizing"}[when[0]]:
                upload(folder)

    with pytest.raises(SourceError, match=r"has changed since (the job|it) was"):
        run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Changing())


def test_a_file_that_is_deleted_meanwhile_is_named(
    upload: Callable[..., str], model_folder: Callable[..., Path]
) -> None:
    source = open_source(upload(model_folder("llama")))
    open_store(str(source.path)).delete(_WEIGHTS)
    with pytest.raises(SourceError, match=f"cannot access '{_WEIGHTS}': the bucket or the file is"):
        list(source.read(["model.norm.weight"]))


_PLACES = {
    "no such bucket": ("s3://no-such-bucket/x", 3, "the bucket or the file is not there"),
    "no such folder": ("BUCKET/nothing", 3, "nothing has no config.json"),
    "a secret in it": ("s3://key:secret@bucket/x", 2, "keep credentials out of the job file: set"),
    "no bucket": ("s3:///x", 2, "name the bucket: s3://bucket/path"),
    "one slash": ("s3:/bucket/x", 2, "name the bucket: s3://bucket/path"),
    "another scheme": ("hf://owner/name", 2, "cannot read a model from 'hf://': write a folder"),
    "in capitals": ("S3://bucket/x", 2, "cannot read a model from 'S3://': write a folder"),
    "a gguf file": ("s3://bucket/x.gguf", 2, "a .gguf file is read from a local disk alone: down"),
}


@pytest.mark.parametrize("case", _PLACES)
def test_a_place_that_is_none_is_refused(
    case: str, bucket: str, job_file: JobFile, refused: Callable[..., str]
) -> None:
    place, code, message = _PLACES[case]
    job = job_file(model={"path": place.replace("BUCKET", bucket)})
    said = refused(code, "check", job)
    assert re.search(rf"\.yaml:\d+:3: model.path: .*{re.escape(message)}", said), said
    assert "secret@" not in said


def test_denied_access_is_said(
    s3_server: str,
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = upload(model_folder("llama"))
    switch, plain = f"{s3_server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urlopen(Request(switch, b"0", plain, method="POST")).close()
    try:
        with pytest.raises(SourceError, match="cannot access '/': access denied; check AWS_ACCESS"):
            open_source(url)
    finally:
        urlopen(Request(switch, b"inf", plain, method="POST")).close()
