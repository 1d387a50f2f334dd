"""Every bad job and store ends with one clear line, its exit code, and nothing written."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.command import quantfleet, quantfleet_process
from workers.store import open_store

JobFile = Callable[..., Path]
_GPTQ = {"scheme": "int4", "group_size": 32, "method": "gptq"}


Refused = Callable[..., str]

_JOBS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown key": (
        {"modle": {"path": "x"}},
        2,
        r"\.yaml:\d+:1: modle: unknown key: write one of name, model, quantization, ",
    ),
    "unknown key in a section": (
        {"quantization": {**_GPTQ, "groupsize": 32}},
        2,
        r"\.yaml:\d+:3: quantization.groupsize: unknown key: write one of method, scheme, ",
    ),
    "wrong type": (
        {"workers": {"count": "two"}},
        2,
        r"\.yaml:\d+:3: workers.count: Input should be a valid integer \(got 'two'\)",
    ),
    "unknown scheme": (
        {"quantization": {"scheme": "int5"}},
        2,
        r"quantization.scheme: unknown scheme 'int5': write one of int4, int8, ",
    ),
    "group size that does not divide": (
        {"quantization": {**_GPTQ, "group_size": 48}},
        2,
        r"quantization.group_size: groups of 48 do not divide the 64 inputs of 'model.layers.0"
        r".self_attn.q_proj': write one of 32, 64, or channel$",
    ),
    "missing model": ({"model": {"path": "nope"}}, 3, r"model.path: there is no /.*/nope: name a"),
    "text too short": (
        {"calibration": {"text": "short.txt", "sequences": 64, "length": 64}},
        2,
        r"calibration.text: 64 sequences of 64 tokens need 4096 tokens, and the text has \d\d: "
        r"give a longer text$",
    ),
    "fewer sequences would do": (
        {"calibration": {"text": "short.txt", "sequences": 64, "length": 4}},
        2,
        r"calibration.text: .* the text has \d\d: write sequences: \d+, or a shorter length$",
    ),
    "missing text": (
        {"calibration": {"text": "nope.txt"}},
        3,
        r"calibration.text: there is no file /.*/nope.txt$",
    ),
    "float16 on the CPU": (
        {"compute_dtype": "float16"},
        2,
        r"compute_dtype: float16 is not for the CPU .*: write float32 or bfloat16$",
    ),
    "override that splits q/k/v": (
        {"quantization": {**_GPTQ, "overrides": [{"match": "*.q_proj", "skip": True}]}},
        2,
        r"quantization.overrides.0.match: splits q_proj/k_proj/v_proj of .*: match all of them or",
    ),
    "smoothing what leaves activations alone": (
        {"quantization": {"scheme": "int4", "method": "smoothquant"}},
        2,
        r"quantization: method smoothquant helps activations to be rounded, which int4 leaves as "
        r"they are: write scheme: int8_dynamic or int8_static or .*, or another method$",
    ),
    "an alpha that is none": (
        {
            "quantization": {
                "scheme": "int8_static",
                "method": "smoothquant",
                "smoothquant": {"alpha": 1.5},
            }
        },
        2,
        r"quantization.smoothquant.alpha: Input should be less than or equal to 1 \(got 1.5\)",
    ),
    "static scales without texts": (
        {"quantization": {"scheme": "int8_static", "method": "rtn"}, "calibration": None},
        2,
        r"int8_static finds its activation scales in texts: add a calibration section$",
    ),
    "a static output head": (
        {
            "quantization": {
                **_GPTQ,
                "overrides": [{"match": "lm_head", "scheme": "int8_static", "method": "rtn"}],
            }
        },
        2,
        r"quantization.overrides.0.scheme: the output head's inputs are not calibrated: write "
        r"scheme: int8_dynamic for it$",
    ),
    "a factor on inputs that the format has no place for": (
        {
            "quantization": {
                "scheme": "int8_dynamic",
                "method": "smoothquant",
                "smoothquant": {"without_norm": "input_factor"},
            }
        },
        2,
        r"quantization.smoothquant.without_norm: compressed-tensors has no place for .*: write "
        r"without_norm: leave, or output.format: native$",
    ),
    "nothing to smooth": (
        {
            "quantization": {
                "scheme": "int8_dynamic",
                "method": "smoothquant",
                "overrides": [{"match": "re:.*(q|k|v|gate|up)_proj", "method": "rtn"}],
            }
        },
        2,
        r"quantization.method: smoothquant finds no norm whose output .*: write rtn, hqq or gptq$",
    ),
    "store below a file": (
        {"output": {"store": "short.txt/store"}},
        3,
        r"output.store: /.*/short.txt/store: cannot access .*; name a folder that can be written$",
    ),
    "store where nothing can be": (
        {"output": {"store": "/proc/store"}},
        3,
        r"output.store: /proc/store: cannot access .*; name a folder that can be written$",
    ),
    "store of an unknown kind": (
        {"output": {"store": "gs://bucket/x"}},
        2,
        r"output.store: cannot store to 'gs://': write a folder or s3://bucket/path",
    ),
}


@pytest.fixture(autouse=True)
def _short_text(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the whale, the sea and the ships " * 3)


@pytest.mark.parametrize("case", _JOBS)
def test_a_bad_job_is_refused(case: str, job_file: JobFile, refused: Refused) -> None:
    sections, code, message = _JOBS[case]
    assert re.search(message, refused(code, "run", job_file(**sections)))


@pytest.mark.parametrize(
    "case",
    ["unknown key", pytest.param("missing model", marks=pytest.mark.slow), "store below a file"],
)
def test_a_process_of_its_own_says_the_same(case: str, job_file: JobFile, refused: Refused) -> None:
    sections, code, message = _JOBS[case]
    job = job_file(**sections)
    assert re.search(message, refused(code, "run", job, command=quantfleet_process))


def test_check_reports_every_fault_at_its_place(job_file: JobFile, refused: Refused) -> None:
    job = job_file()
    job.write_text(
        "model:\n"
        f"  path: {_model_of(job)}\n"
        "modle: 1\n"
        "compute_dtype: float16\n"
        "quantization:\n"
        "  scheme: int4\n"
        "  group_size: 48\n"
        "  overrides:\n"
        "  - skip: true\n"
        "    match: '*.q_proj'\n"
        "  - match: nothing\n"
        "    skip: true\n"
        "calibration: {text: nope.txt}\n"
        "output: {store: short.txt/x}\n"
    )
    faults = {
        (3, 1, "modle"),
        (4, 1, "compute_dtype"),
        (7, 3, "quantization.group_size"),
        (10, 5, "quantization.overrides.0.match"),
        (11, 5, "quantization.overrides.1.match"),
        (13, 15, "calibration.text"),
        (14, 10, "output.store"),
    }
    lines = refused(2, "check", job, lines=len(faults)).splitlines()
    found = [re.fullmatch(rf"{job}:(\d+):(\d+): ([\w.]+): .+", line) for line in lines]
    assert {(int(m[1]), int(m[2]), m[3]) for m in found if m} == faults
    as_json = json.loads(quantfleet("check", "--json", job).out)["faults"]
    assert {(fault["line"], fault["column"], fault["field"]) for fault in as_json} == faults


def _model_of(job: Path) -> str:
    import yaml

    path: str = yaml.safe_load(job.read_text())["model"]["path"]
    return path


def test_a_missing_bucket_is_named(bucket: str, job_file: JobFile, refused: Refused) -> None:
    job = job_file(output={"store": "s3://no-such-bucket/x"})
    assert "no bucket 'no-such-bucket': create it, or name another" in refused(3, "run", job)


def test_an_endpoint_that_is_not_there_is_named(
    bucket: str, job_file: JobFile, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    job = job_file(output={"store": f"{bucket}/x"})
    message = "no answer from 127.0.0.1:1: check AWS_ENDPOINT_URL"
    assert message in refused(3, "run", job, command=quantfleet_process)
    assert message in refused(3, "status", f"{bucket}/x")
    assert message in refused(3, "fetch", f"{bucket}/x", job.parent / "out")


@pytest.fixture
def guarded(bucket: str, s3_server: str) -> Iterator[tuple[str, str]]:
    """A key and its secret; as long as this lives the server checks every request for one."""
    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="user")
    everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
    key = iam.create_access_key(UserName="user")["AccessKey"]
    _requests_without_keys(s3_server, "0")
    yield key["AccessKeyId"], key["SecretAccessKey"]
    _requests_without_keys(s3_server, "inf")


def _requests_without_keys(s3_server: str, number: str) -> None:
    url, plain = f"{s3_server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urlopen(Request(url, data=number.encode(), headers=plain, method="POST")).close()


def test_wrong_credentials_are_told_from_right_ones(
    guarded: tuple[str, str],
    bucket: str,
    job_file: JobFile,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, secret = guarded
    job = job_file(output={"store": f"{bucket}/x"})
    wrong = "not-the-secret"
    for pair in ((key, wrong), ("AKIAWRONG", secret)):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", pair[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", pair[1])
        for args in (["run", job], ["status", f"{bucket}/x/job"], ["list", f"{bucket}/x"]):
            said = refused(3, *args)
            assert "access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said
            assert wrong not in said
            assert secret not in said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    assert quantfleet("check", job).code == 0
    assert open_store(bucket).list() == []
