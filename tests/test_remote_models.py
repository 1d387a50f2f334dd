"""Models read straight from object storage: the same bytes, few requests, and what is refused."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checks import Prepared, check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from quantcore.errors import SourceError
from tests.behind_proxy import check_job_behind
from tests.proxy import FAULTS, Proxy, proxy_to
from workers.sources import ModelSource, open_source, remote
from workers.store import open_store

JobFile = Callable[..., Path]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def proxy(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, and the environment that leads through it."""
    with proxy_to(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def _run(job: Path | Prepared) -> dict[str, bytes]:
    prepared = check(job) if isinstance(job, Path) else job
    devices = ["cpu"] * prepared.workers
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, devices), Observer())
    store = open_store(result.store)
    return {name: store.get(name) for name in store.list("model/")}


_JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"compute_dtype": "bfloat16", "workers": {"count": 2}},
    "gptq in the stored dtype": {},
    "shards": {
        "calibration": {"sequences": 8, "length": 32, "shards": 3},
        "workers": {"count": 3},
    },
    "rtn, and another block untouched": {
        "quantization": {
            "scheme": "float8",
            "group_size": "tensor",
            "method": "rtn",
            "overrides": [{"match": "*.layers.1.*", "skip": True}],
        },
        "calibration": None,
    },
    "a block that no method looks at": {
        "quantization": {
            "scheme": "int4",
            "group_size": 32,
            "method": "gptq",
            "overrides": [{"match": "*.layers.1.*", "skip": True}],
        },
    },
    "smoothquant": {
        "quantization": {
            "scheme": "int8_dynamic",
            "method": "smoothquant",
            "smoothquant": {"rounding": "gptq"},
        },
    },
}


@pytest.mark.parametrize("case", _JOBS)
def test_a_job_gives_the_bytes_that_it_gives_from_a_folder(
    case: str,
    upload: Callable[..., str],
    bucket: str,
    job_file: JobFile,
    model_folder: Callable[..., Path],
    text_file: Path,
) -> None:
    several_files = list(_JOBS).index(case) % 2 == 0
    folder = model_folder("llama", **({"max_shard_size": "100KB"} if several_files else {}))
    sections = {**_JOBS[case]}
    if sections.get("calibration"):
        sections["calibration"] = {"text": str(text_file), **sections["calibration"]}
    there = job_file("there", **sections, model={"path": upload(folder)}, output={"store": bucket})
    here = job_file("here", **sections, model={"path": str(folder)})
    assert _run(there) == _run(here)


def test_a_job_goes_on_from_the_same_model_elsewhere(
    upload: Callable[..., str], job_file: JobFile, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("llama")
    whole = _run(job_file())
    store = open_store(str(job_file().parent / "store" / "job"))
    for name in ("manifest.json", "ledger/block-00002.json", "ledger/outside.json"):
        store.delete(name)
    assert _run(job_file(model={"path": upload(folder)})) == whole


class _Counted:
    """The bytes of weights that are asked for, by tensor file."""

    def __init__(self, source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = source
        self.bytes = 0
        store: Any = source._store  # type: ignore[attr-defined]
        read_range = type(store).read_range

        def counting(store: Any, entry: Any, first: int, into: Any) -> None:
            self.bytes += sum(part.nbytes for part in into) if first else 0
            read_range(store, entry, first, into)

        monkeypatch.setattr(type(store), "read_range", counting)


@pytest.mark.parametrize(
    ("case", "of_blocks", "of_the_rest"),
    [("gptq in the stored dtype", 2, 3), ("rtn, and another block untouched", 2, 2)],
)
def test_no_weight_is_fetched_more_often_than_is_said(
    case: str,
    of_blocks: int,
    of_the_rest: int,
    upload: Callable[..., str],
    job_file: JobFile,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One worker: the survey, each block once; what is outside also to embed, and to copy."""
    prepared = check(job_file(**_JOBS[case], model={"path": upload(model_folder("llama"))}))
    counted = _Counted(prepared.source, monkeypatch)
    _run(prepared)
    sizes = {name: info.num_bytes for name, info in prepared.source.tensors.items()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    rest = sum(sizes.values()) - blocks
    assert counted.bytes == of_blocks * blocks + of_the_rest * rest
    told = prepared.prediction.network["of the model"]
    assert counted.bytes <= told <= 1.5 * counted.bytes


def test_a_survey_makes_few_requests_and_a_tensor_none_of_its_neighbours(
    upload: Callable[..., str], model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(upload(model_folder("llama")))
    asked = []
    store: Any = source._store  # type: ignore[attr-defined]
    read_range = store.read_range
    store.read_range = lambda entry, first, into: (
        asked.append(sum(part.nbytes for part in into)),
        read_range(entry, first, into),
    )
    list(source.read(source.tensors))
    assert len(asked) == 1
    list(source.read(["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]))
    assert sorted(asked[1:]) == [64 * 4, 128 * 64 * 4]


def test_tensors_longer_than_a_request_come_in_several(
    upload: Callable[..., str],
    tmp_path: Path,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also empty ones, scalars, every dtype, and what begins at an odd byte of its file."""
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1000)
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    more = {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.randn(33, 77, dtype=torch.float64),
        "c": torch.tensor(True),
        "d": torch.empty(0, 5),
        "e": torch.randn(9, 111).to(torch.float8_e4m3fn),
        "f": torch.randn(5000).to(torch.bfloat16),
    }
    data = b"".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in more.values())
    names = ("U8", "F64", "BOOL", "F32", "F8_E4M3", "BF16")
    header, at = {}, 0
    for (name, tensor), dtype in zip(more.items(), names, strict=True):
        offsets = [at, at := at + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    (folder / _WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    source = open_source(upload(folder))
    found = dict(source.read(reversed(more)))
    assert found.keys() == more.keys()
    for name, tensor in more.items():
        assert found[name].dtype == tensor.dtype == source.tensors[name].dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_outlives_a_fault(
    proxy: Proxy,
    upload: Callable[..., str],
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """Some of them break in the middle of a range."""
    monkeypatch.setattr(remote, "REQUEST_BYTES", 50_000)
    folder = model_folder("llama", max_shard_size="100KB")
    url = upload(folder)
    proxy.trouble(0.3, seed=1, faults=(fault,))
    source = open_source(url, patience_s=60)
    found = dict(source.read(source.tensors))
    here = dict(open_source(folder).read(source.tensors))
    assert proxy.met[fault] > 3
    assert all(torch.equal(found[name], here[name]) for name in here)
    assert source.tokenizer()("the whale").input_ids


def test_a_job_with_killed_workers_and_a_bad_network_gives_the_same_bytes(
    proxy: Proxy,
    bucket: str,
    upload: Callable[..., str],
    job_file: JobFile,
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = {"path": upload(model_folder("llama", max_shard_size="100KB"))}
    check_job_behind(proxy, bucket, job_file, tmp_path, 1, model=model)


@pytest.mark.gpu
def test_a_gpu_gives_the_bytes_that_it_gives_from_a_folder(
    upload: Callable[..., str], job_file: JobFile, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("llama")
    found = []
    for name, path in (("here", str(folder)), ("there", upload(folder))):
        prepared = check(job_file(name, model={"path": path}, compute_dtype="bfloat16"))
        result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cuda"]), Observer())
        store = open_store(result.store)
        found.append({name: store.get(name) for name in store.list("model/")})
    assert found[0] == found[1]


def test_without_patience_a_broken_store_is_told_at_once(
    proxy: Proxy, upload: Callable[..., str], model_folder: Callable[..., Path]
) -> None:
    url = upload(model_folder("llama"))
    proxy.trouble(1.0, seed=1, faults=("503",))
    with pytest.raises(SourceError, match="reduce your request rate"):
        open_source(url)


def test_code_and_weights_are_not_fetched_and_companions_are(
    proxy: Proxy, upload: Callable[..., str], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    for name in ("modeling_x.py", "pytorch_model.bin", ".hidden", "run.sh", "a/b.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no")
    (folder / "a" / "notes.md").write_bytes(b"yes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    url = upload(folder)
    proxy.paths.clear()
    source, here = open_source(url), open_source(folder)
    copies = tmp_path / "there", tmp_path / "here"
    written = []
    for opened, copy in zip((source, here), copies, strict=True):
        copy.mkdir()
        written.append(opened.write_companions(copy))
        assert opened.tokenizer()("the whale").input_ids
        assert "auto_map" not in opened.config_json()
    assert written[0] == written[1]
    assert "a/notes.md" in written[0]
    assert source.config_json() == here.config_json()
    assert source.companion_bytes() == here.companion_bytes()
    for name in written[0]:
        assert (copies[0] / name).read_bytes() == (copies[1] / name).read_bytes()
    fetched = {path.rpartition("/models/it/")[2] for path in proxy.paths if "?" not in path}
    assert fetched == {"config.json", _WEIGHTS, *written[0]}
    assert len(proxy.paths) == len(fetched) + 1, "each once, and the list"
