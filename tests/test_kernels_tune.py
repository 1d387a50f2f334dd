"""The command that searches for launches: what it refuses before, and what it writes."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from quantkernels.launches import VERSIONS, Launch, Shape, Tuned, parse
from quantkernels.tune import __main__ as tune

GPU = "Some GPU"
LAUNCH = Launch(rows=64, tokens=8, split=3, turn=128, stages=4, warps=2)
FEW = ["--shapes", "256x128", "512x128", "--of", "weight_only/int4/64", "--tokens", "1", "16"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "4096"], "4096: write ROWSxCOLUMNS, as 28672x4096"),
        (["--shapes", "0x128"], "0x128: write ROWSxCOLUMNS"),
        (["--of", "weight_only"], "weight_only: write one of weight_only/int4, "),
        (["--of", "weight_only/int4/48"], "32, 64 or 128 columns"),
        (["--of", "weight_only/int4/64/1"], "weight_only/CODES/GROUP"),
        (["--of", "marlin/int4"], "weight_only/float8, w8a8/int8, w8a8/float8"),
        (["--of", "w8a8/int4/32"], "w8a8/int4/32: write one of"),
        (["--tokens", "0"], "0: write a number of 1 or more"),
        (["--most", "-1"], "-1: write a number of 1 or more"),
        (["--shapes", "256x100", "--of", "weight_only/int4/64"], "100 columns are no groups of 64"),
        (["--out", "nowhere/at/all.json"], "nowhere/at/all.json: write a file in a folder"),
        (["--out", "bad.json"], r"bad.json holds no launches of this GPU .*write another name"),
        (["--out", "other.json"], "of 'Another', not of 'Some GPU'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_the_search(
    arguments: list[str],
    words: str,
    gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("other.json").write_text('{"gpu": "Another", "versions": {}, "launches": []}')
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    assert words.partition(" .*")[0] in told.splitlines()[-1]
    assert words.partition(" .*")[2] in told.splitlines()[-1]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "there is no CUDA GPU here" in capsys.readouterr().err


class Pool:
    """In the place of processes."""

    given_up: ClassVar[list[bool]] = []

    def __init__(self, **_: Any) -> None: ...
    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        self.given_up.append(cancel_futures and not wait)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_an_interrupted_search_leaves_a_whole_file(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "own.json"
    found: list[Shape] = []

    def search(work: dict[Shape, list[Future[list[Launch]]]]) -> Iterator[Tuned]:
        for shape in work:
            if len(found) == 3:
                raise KeyboardInterrupt
            found.append(shape)
            yield Tuned(shape=shape, launch=LAUNCH, time_us=10.0, dense_us=20.0)

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "given_up", [])
    monkeypatch.setattr(tune, "compiling", lambda *_: [])
    monkeypatch.setattr(tune, "search", search)
    with pytest.raises(KeyboardInterrupt):
        tune.main([*FEW, "--out", str(out)])
    assert Pool.given_up == [True]  # thousands of launches that wait to be compiled
    assert [entry.shape for entry in parse(out.read_text(), GPU, "")] == found[:2]
    assert json.loads(out.read_text())["versions"] == VERSIONS

    def broken(self: Path, text: str) -> int:
        raise OSError("no room is left")

    before = out.read_text()
    found.clear()
    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="no room"):
        tune.main([*FEW, "--out", str(out)])
    assert out.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["own.json"]


def test_what_the_file_has_is_not_searched_for_again(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "own.json"
    searched: list[list[Shape]] = []

    def search(work: dict[Shape, list[Future[list[Launch]]]]) -> Iterator[Tuned]:
        searched.append(list(work))
        for shape in work:
            yield Tuned(shape=shape, launch=LAUNCH, time_us=10.0, dense_us=20.0)

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "compiling", lambda *_: [])
    monkeypatch.setattr(tune, "search", search)
    tune.main([*FEW, "--out", str(out)])
    assert [len(shapes) for shapes in searched] == [2, 2]
    searched.clear()
    tune.main([*FEW, "64", "--shapes", "512x128", "1024x128", "--missing", "--out", str(out)])
    assert [[shape.tokens for shape in shapes] for shapes in searched] == [[64], [1, 16, 64]]
    searched.clear()
    tune.main([*FEW, "--missing", "--out", str(out)])
    assert searched == [] and len(parse(out.read_text(), GPU, "")) == 8
