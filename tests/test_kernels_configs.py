"""Launches of the weight-only kernels as data: which is taken, and what becomes of bad data."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from quantkernels.weight_only import configs
from quantkernels.weight_only.configs import (
    DENSE,
    FOLDER_VARIABLE,
    KERNEL_VERSION,
    Config,
    Shape,
    Tuned,
    parse,
    usual,
)

H200 = "NVIDIA H200"
SHAPE = Shape(codes="int4", group=128, rows=28672, columns=4096, tokens=1)
LAUNCH = Config(rows=64, tokens=8, split=3, turn=128, stages=4, warps=2)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    configs._chosen.cache_clear()
    configs._load.cache_clear()
    yield
    configs._chosen.cache_clear()
    configs._load.cache_clear()


def written(folder: Path, gpu: str, entries: list[Tuned], version: int = KERNEL_VERSION) -> None:
    document = {
        "kernel_version": version,
        "weight_only": [entry.document() for entry in entries],
    }
    (folder / configs.file_name(gpu)).write_text(json.dumps(document))


def tuned(shape: Shape, launch: Config = LAUNCH) -> Tuned:
    return Tuned(shape=shape, config=launch, time_us=10.0, dense_us=20.0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_shape_that_was_tuned_takes_its_launch(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE), tuned(replace(SHAPE, tokens=64), DENSE)])
    assert configs._chosen(SHAPE, "Some GPU", 100) == LAUNCH
    assert configs._chosen(replace(SHAPE, tokens=7), "Some GPU", 100) == LAUNCH
    assert configs._chosen(replace(SHAPE, tokens=60), "Some GPU", 100) == DENSE


def test_a_near_shape_keeps_the_number_of_programs(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE)])
    smaller = configs._chosen(replace(SHAPE, rows=7168), "Some GPU", 100)
    assert smaller == replace(LAUNCH, split=12)
    short = configs._chosen(replace(SHAPE, rows=64, columns=256), "Some GPU", 100)
    assert short.split == 2  # it has no more columns to be split


def test_far_shapes_and_gpus_without_data_take_what_is_usual(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE)])
    many = replace(SHAPE, tokens=200)
    assert configs._chosen(many, "Some GPU", 100) == usual(many, 100)
    assert configs._chosen(SHAPE, "Another", 100) == usual(SHAPE, 100)
    assert usual(replace(SHAPE, tokens=4096), 100).dense
    for tokens in (1, 5, 33, 64, 200):
        for rows, columns in ((1, 1), (300, 100_000), (128_256, 4096)):
            launch = usual(replace(SHAPE, rows=rows, columns=columns, tokens=tokens), 132)
            assert 1 <= launch.split <= max(1, columns // launch.turn)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("{}", "kernel_version"),
        ('{"kernel_version": 0, "weight_only": []}', "version 0, and this is"),
        ('{"kernel_version": 1, "weight_only": [{"codes": "int4"}]}', "group"),
    ],
)
def test_bad_data_are_left_aside_with_a_warning(own: Path, text: str, words: str) -> None:
    (own / configs.file_name("Some GPU")).write_text(text)
    with pytest.warns(UserWarning, match=rf"Some_GPU.json are left aside .*{words}"):
        assert configs._chosen(SHAPE, "Some GPU", 100) == usual(SHAPE, 100)


def test_a_launch_that_cannot_be_is_refused() -> None:
    document = json.loads(json.dumps(tuned(SHAPE).document()))
    document["config"]["rows"] = 48
    with pytest.raises(ValueError, match="cannot be"):
        Tuned.of(document)


def test_bad_own_data_leave_what_is_shipped(own: Path) -> None:
    (own / configs.file_name(H200)).write_text("{")
    with pytest.warns(UserWarning, match="left aside"):
        assert configs.load(H200)


def test_what_is_shipped_can_be_read_and_is_better_than_dense() -> None:
    folder = files("quantkernels") / "tuned"
    shipped = [file for file in folder.iterdir() if file.name.endswith(".json")]
    assert {file.name for file in shipped} >= {"NVIDIA_H200.json"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in shipped:
            entries = parse(file.read_text())
            shapes = [entry.shape for entry in entries]
            assert len(set(shapes)) == len(shapes)
            assert all(
                entry.time_us < entry.dense_us for entry in entries if entry.shape.tokens <= 64
            )
