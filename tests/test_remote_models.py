"""Models read straight from object storage: the same bytes, few requests, and what is refused."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checks import Prepared, check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from quantcore.errors import QuantfleetError, SourceError, SpecError
from tests.command import quantfleet, quantfleet_process
from tests.proxy import FAULTS, Proxy, proxy_to
from workers.sources import ModelSource, open_source
from workers.store import open_store

JobFile = Callable[..., Path]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def proxy(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, and the environment that leads through it."""
    with proxy_to(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def upload(bucket: str) -> Callable[..., str]:
    """`upload(folder)`: its URL in a new bucket."""

    def put(folder: Path, name: str = "models/it") -> str:
        store = open_store(f"{bucket}/{name}")
        for file in folder.rglob("*"):
            if file.is_file():
                store.put_file(file.relative_to(folder).as_posix(), file)
        return store.url

    return put


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
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "an index"])
def test_a_job_gives_the_bytes_that_it_gives_from_a_folder(
    case: str,
    sharded: bool,
    upload: Callable[..., str],
    bucket: str,
    job_file: JobFile,
    model_folder: Callable[..., Path],
    text_file: Path,
) -> None:
    folder = model_folder("llama", **({"max_shard_size": "100KB"} if sharded else {}))
    sections = {**_JOBS[case]}
    if sections.get("calibration"):
        sections["calibration"] = {"text": str(text_file), **sections["calibration"]}
    there = job_file("there", **sections, model={"path": upload(folder)}, output={"store": bucket})
    here = job_file("here", **sections, model={"path": str(folder)})
    assert _run(there) == _run(here)


def test_workers_on_ray_open_the_model_themselves(
    upload: Callable[..., str], bucket: str, job_file: JobFile, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("llama")
    workers = {"count": 2}
    remote = {"model": {"path": upload(folder)}, "output": {"store": bucket}}
    outcome = quantfleet_process("run", job_file("there", workers=workers, **remote))
    assert outcome.code == 0, outcome
    store = open_store(f"{bucket}/there")
    files = {name: store.get(name) for name in store.list("model/")}
    assert files == _run(job_file("here"))


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
    upload: Callable[..., str], tmp_path: Path, model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also empty ones, scalars, every dtype, and what begins at an odd byte of its file."""
    import workers.sources.remote as remote

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
    proxy: Proxy, upload: Callable[..., str], model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, fault: str,
) -> None:
    """Some of them break in the middle of a range."""
    import workers.sources.remote as remote

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


def test_without_patience_a_broken_store_is_told_at_once(
    proxy: Proxy, upload: Callable[..., str], model_folder: Callable[..., Path]
) -> None:
    url = upload(model_folder("llama"))
    proxy.trouble(1.0, seed=1, faults=("503",))
    with pytest.raises(SourceError, match="reduce your request rate"):
        open_source(url)


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
    assert pytest.raises  # one line, and nothing is left behind: see `refused`
    import re

    assert re.search(rf"\.yaml:\d+:3: model.path: s?3?.*{message}", said), said
