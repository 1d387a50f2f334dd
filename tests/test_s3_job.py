"""A user's whole way, on a folder and on S3: run, status, list, fetch, load, generate."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command import Outcome, quantfleet, quantfleet_process
from workers.store import open_store

JobFile = Callable[..., Path]


def _model_bytes(job: str) -> dict[str, bytes]:
    store = open_store(job)
    return {name: store.get(name) for name in store.list("model/")}


def _in_process(job: Path) -> Outcome:
    return quantfleet("run", "--in-process", job)


def _with_ray(job: Path) -> Outcome:
    return quantfleet_process("run", job)


def _uploaded(folder: Path, url: str) -> dict[str, str]:
    store = open_store(url)
    for file in folder.iterdir():
        store.put_file(file.name, file)
    return {"path": url}


@pytest.mark.parametrize(
    ("kind", "run"),
    [("local", _in_process), ("s3", _in_process), ("s3", _with_ray)],
    ids=["local", "s3", "s3-ray"],
)
def test_from_a_job_file_to_generated_tokens(
    kind: str,
    run: Callable[[Path], Outcome],
    job_file: JobFile,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """On Ray the model is on S3, too: its workers open it themselves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = tmp_path / "here"
    root = str(here) if kind == "local" else f"{request.getfixturevalue('bucket')}/path"
    job = f"{root}/job"
    sections = {"output": {"store": root}, "workers": {"count": 2}}
    if run is _with_ray:
        sections["model"] = _uploaded(model_folder("llama"), f"{root}-model")
    outcome = run(job_file(**sections))
    assert outcome.code == 0, outcome
    assert f"quantfleet fetch {job} ./out" in outcome.out
    assert here.exists() == (kind == "local")

    assert quantfleet("status", job).out == "job: finished, 3 of 3 blocks\n"
    assert quantfleet("list", root).out == "job: finished, 3 of 3 blocks\n"
    listed = json.loads(quantfleet("list", "--json", root).out)
    assert [(entry["store"], entry["finished"]) for entry in listed] == [(job, True)]

    out = tmp_path / "out"
    fetched = quantfleet("fetch", job, out)
    assert fetched.code == 0, fetched
    assert "all verified" in fetched.out
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer("the whale", return_tensors="pt").input_ids
    tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, prompt.shape[1] + 4)

    again = run(job_file(output={"store": root})) if run is _in_process else None
    assert again is None or "this job is finished already" in again.err

    alone = job_file("alone", workers={"count": 1}, output={"store": str(tmp_path / "alone")})
    assert _in_process(alone).code == 0
    whole = _model_bytes(str(tmp_path / "alone" / "alone"))
    assert len(whole) > 4
    assert _model_bytes(job) == whole
    assert {name.removeprefix("model/"): data for name, data in whole.items()}.items() <= {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }.items()


def test_a_job_on_s3_that_was_cut_short_goes_on_there(bucket: str, job_file: JobFile) -> None:
    job = job_file(output={"store": bucket})
    assert quantfleet("run", "--in-process", job).code == 0
    store = open_store(f"{bucket}/job")
    whole = _model_bytes(store.url)
    for name in ("manifest.json", "ledger/block-00001.json", "ledger/outside.json"):
        store.delete(name)
    facts = json.loads(quantfleet("status", "--json", store.url).out)
    assert (facts["blocks_done"], facts["blocks"], facts["finished"]) == (2, 3, False)
    missing = quantfleet("fetch", store.url, job.parent / "out")
    assert (missing.code, (job.parent / "out").exists()) == (3, False)
    resumed = quantfleet("resume", "--in-process", store.url)
    assert resumed.code == 0, resumed
    assert "2 of 3 blocks are finished: going on" in resumed.err
    assert _model_bytes(store.url) == whole
    assert store.exists("manifest.json")
