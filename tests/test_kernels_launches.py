"""Launches as data: which is taken, and what becomes of bad data."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
from quantkernels import choice, launches
from quantkernels.choice import choose, foretold, nearest, usual
from quantkernels.launches import (
    FOLDER_VARIABLE,
    OTHER,
    VERSIONS,
    Launch,
    Shape,
    Tuned,
    parse,
)

H200 = "NVIDIA H200"
SHAPE = Shape(kernel="weight_only", codes="int4", group=128, rows=28672, columns=4096, tokens=1)
LAUNCH = Launch(rows=64, tokens=8, split=3, turn=128, stages=4, warps=2)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    choose.cache_clear()
    launches._load.cache_clear()
    yield
    choose.cache_clear()
    launches._load.cache_clear()


def written(folder: Path, gpu: str, entries: list[Tuned], **versions: int) -> None:
    document = {
        "gpu": gpu,
        "versions": {**VERSIONS, **versions},
        "launches": [entry.document() for entry in entries],
    }
    (folder / launches.file_name(gpu)).write_text(json.dumps(document))


def tuned(shape: Shape, launch: Launch = LAUNCH) -> Tuned:
    return Tuned(shape=shape, launch=launch, time_us=10.0, dense_us=20.0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_shape_that_was_tuned_takes_its_launch(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE), tuned(replace(SHAPE, tokens=64), OTHER)])
    assert choose(SHAPE, "Some GPU", 100) == LAUNCH
    assert choose(replace(SHAPE, tokens=7), "Some GPU", 100) == LAUNCH
    assert choose(replace(SHAPE, tokens=60), "Some GPU", 100) == OTHER


def test_a_near_shape_of_few_tokens_has_programs_for_all_multiprocessors(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE)])  # 1,344 programs
    smaller = choose(replace(SHAPE, rows=7168), "Some GPU", 100)
    assert smaller == replace(LAUNCH, split=7)  # 784 programs: eight at a time, and no more to sum
    short = choose(replace(SHAPE, rows=64, columns=256), "Some GPU", 100)
    assert short.split == 2  # it has no more columns to be split
    written(own, "Another", [tuned(SHAPE, replace(LAUNCH, split=1))])  # 448 programs
    assert choose(replace(SHAPE, rows=14_336), "Another", 100).split == 2


WIDE = Launch(
    rows=128, tokens=128, split=1, turn=128, stages=4, warps=8, early=True, overlapped=True
)
MANY = Tuned(shape=replace(SHAPE, tokens=512), launch=WIDE, time_us=180.0, dense_us=160.0)


def test_spans_of_many_tokens_fill_the_multiprocessors_evenly(own: Path) -> None:
    written(own, "Some GPU", [MANY])
    odd = replace(SHAPE, rows=5120, columns=28_672, tokens=256)  # 80 programs
    assert choose(odd, "Some GPU", 160).split == 2
    assert choose(odd, "Some GPU", 132).split == 3  # two rounds of a third, not two of a half
    assert choose(odd, "Some GPU", 80).split == 1
    short = replace(odd, columns=512)
    assert choose(short, "Some GPU", 132).split == 1  # sums take longer than what they save


def test_the_launch_that_should_end_first_is_taken_of_some_near_ones(own: Path) -> None:
    tall = replace(WIDE, tokens=256, stages=3)
    far = replace(MANY, shape=replace(SHAPE, rows=6144, tokens=512), launch=tall, time_us=40.0)
    written(own, "Some GPU", [MANY, far])
    between = replace(SHAPE, rows=16_384, tokens=512)  # nearer to MANY
    assert nearest(between, "Some GPU") == MANY
    assert choose(between, "Some GPU", 132) == tall
    written(own, "Another", [MANY, replace(far, time_us=90.0)])
    assert choose(between, "Another", 132) == WIDE
    assert choose(far.shape, "Another", 132) == tall  # which is its own


@pytest.mark.parametrize("split", [1, 3])
def test_a_launch_of_a_tuned_shape_is_foretold_what_it_took(split: int) -> None:
    for launch in (replace(WIDE, overlapped=False), WIDE):
        small = replace(MANY.shape, rows=4096)
        known = replace(MANY, shape=small, launch=replace(launch, split=split))
        assert foretold(known, known.launch, known.shape, 132) == pytest.approx(180.0)


def test_programs_that_have_a_multiprocessor_to_themselves_are_foretold_no_faster() -> None:
    known = replace(MANY, launch=replace(LAUNCH, split=1, tokens=64))  # 3,584 programs
    fewer = [replace(MANY.shape, rows=rows, tokens=64) for rows in (28_672, 14_336, 8192)]
    times = [foretold(known, known.launch, shape, 132) for shape in fewer]
    assert times[0] == times[1] == times[2]  # 3.4, 1.7 and one for each
    overlapped = [foretold(MANY, MANY.launch, shape, 100) for shape in fewer]
    assert overlapped[0] > overlapped[1] > overlapped[2]


def test_the_same_rows_and_columns_are_nearer_than_the_same_tokens(own: Path) -> None:
    small = replace(SHAPE, rows=4096, tokens=2048)
    written(own, "Some GPU", [tuned(replace(SHAPE, tokens=1024), OTHER), tuned(small)])
    assert not choose(replace(small, tokens=1024), "Some GPU", 100).other
    assert choose(replace(SHAPE, tokens=900), "Some GPU", 100).other
    assert not choose(replace(small, tokens=8192), "Some GPU", 100).other  # as for 4,096
    few = [tuned(replace(SHAPE, tokens=8), OTHER), tuned(replace(SHAPE, tokens=32))]
    written(own, "Another", few)
    assert not choose(replace(SHAPE, tokens=16), "Another", 100).other  # in one tile


def test_familiar_launches_are_the_best_of_others_for_about_as_many_tokens() -> None:
    familiar = pytest.importorskip("quantkernels.tune.subjects").familiar
    shape = replace(SHAPE, rows=4096, tokens=64)
    near = replace(LAUNCH, tokens=64, warps=4, split=1)
    known = [
        tuned(replace(SHAPE, tokens=32), near),
        tuned(replace(SHAPE, tokens=1)),
        tuned(replace(SHAPE, codes="int8", tokens=64), replace(near, warps=8)),
        tuned(replace(SHAPE, tokens=64), OTHER),
    ]
    found = list(familiar(shape, known, 100))
    assert found
    assert {replace(launch, split=1) for launch in found} == {near}
    assert len({launch.split for launch in found}) == len(found) > 1
    assert OTHER in set(familiar(replace(shape, tokens=128), known, 100))


def test_where_products_bind_tiles_are_tried_whole_though_some_multiprocessors_have_none() -> None:
    """96 of them for 132 multiprocessors; of few tokens, whose weight is read, all have work."""
    candidates = pytest.importorskip("quantkernels.tune.subjects").candidates
    many = replace(SHAPE, rows=6144, columns=4096, tokens=256)
    found = set(candidates(many, 132, hopper=True))
    assert WIDE in found
    programs = [
        -(-6144 // of.rows) * of.split
        for of in candidates(replace(many, tokens=16), 132, hopper=True)
    ]
    assert min(programs) >= 99


def test_a_gpu_of_the_same_multiprocessors_knows_what_one_does_not(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice.SIBLINGS[choice.SIBLINGS[H200]] == H200
    monkeypatch.setattr(choice, "SIBLINGS", {"Some GPU": "A sibling"})
    written(own, "Some GPU", [tuned(SHAPE)])
    written(own, "A sibling", [tuned(SHAPE, OTHER), tuned(replace(SHAPE, tokens=128), OTHER)])
    assert choose(SHAPE, "Some GPU", 132) == LAUNCH
    assert choose(replace(SHAPE, tokens=128), "Some GPU", 132) == OTHER


@pytest.mark.parametrize("gpu", [H200, choice.SIBLINGS[H200]])
def test_every_shape_that_is_shipped_takes_its_own_launch(gpu: str) -> None:
    entries = launches.load(gpu)
    assert [choose(entry.shape, gpu, 132) for entry in entries] == [e.launch for e in entries]
    assert not any(launches.narrow(entry.launch, entry.shape.group) for entry in entries)


def test_a_launch_that_would_be_narrow_for_a_larger_group_is_left_to_its_own(own: Path) -> None:
    early = replace(LAUNCH, tokens=64, warps=4, early=True)
    of_64 = replace(SHAPE, group=64, tokens=64)
    far = replace(SHAPE, rows=7168, tokens=64)
    written(own, "Some GPU", [tuned(of_64, early), tuned(far, replace(early, turn=256))])
    assert choose(of_64, "Some GPU", 132) == early
    assert choose(replace(of_64, group=32), "Some GPU", 132) == early
    assert choose(replace(of_64, group=128), "Some GPU", 132).turn == 256
    assert launches.narrow(early, 128) and not launches.narrow(replace(early, early=False), 128)


def test_tokens_come_before_whose_multiprocessors_they_were(own: Path) -> None:
    """A launch for 16 tokens at a time would read the weight twice for 32."""
    few, some = replace(SHAPE, tokens=16), replace(SHAPE, tokens=32)
    for_some = replace(LAUNCH, tokens=32)
    written(own, "Some GPU", [tuned(few)])
    written(own, "A sibling", [tuned(few, OTHER), tuned(some, for_some)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "SIBLINGS", {"Some GPU": "A sibling"})
        assert choose(few, "Some GPU", 100) == LAUNCH
        for tokens in (17, 32):
            assert choose(replace(SHAPE, tokens=tokens), "Some GPU", 100) == for_some


def test_a_launch_for_many_tokens_is_one_for_more(own: Path) -> None:
    many = replace(SHAPE, kernel="w8a8", codes="int8", group=0, tokens=2048)
    for_many = replace(LAUNCH, tokens=128, split=1)
    written(own, "Some GPU", [tuned(many, for_many), tuned(replace(many, tokens=512), OTHER)])
    assert choose(replace(many, tokens=8192), "Some GPU", 100) == for_many
    assert choose(replace(many, tokens=100_000), "Some GPU", 100) == for_many
    assert choose(replace(many, tokens=256), "Some GPU", 100).other
    assert choose(replace(many, tokens=16), "Some GPU", 100) == usual(replace(many, tokens=16), 100)


@pytest.mark.parametrize("gpu", [H200, choice.SIBLINGS[H200]])
@pytest.mark.parametrize("kernel", VERSIONS)
def test_every_number_of_tokens_finds_what_was_searched(gpu: str, kernel: launches.Kernel) -> None:
    for codes, group in (("int4", 128), ("int8", 0), ("float8", 0)):
        if (kernel, codes) == ("w8a8", "int4"):  # which is none
            continue
        shape = replace(SHAPE, kernel=kernel, codes=codes, group=group)
        for tokens in (1, 2, 3, 8, 9, 17, 40, 64, 100, 256, 500, 1000, 2048, 4096, 8192, 16_384):
            assert nearest(replace(shape, tokens=tokens), gpu) is not None, (codes, tokens)


def test_far_shapes_and_gpus_without_data_take_what_is_usual(own: Path) -> None:
    written(own, "Some GPU", [tuned(SHAPE)])
    many = replace(SHAPE, tokens=200)
    assert choose(many, "Some GPU", 100) == usual(many, 100)
    assert choose(SHAPE, "Another", 100) == usual(SHAPE, 100)
    assert usual(replace(SHAPE, tokens=4096), 100).other
    for tokens in (1, 5, 33, 64, 200):
        for rows, columns in ((1, 1), (300, 100_000), (128_256, 4096)):
            launch = usual(replace(SHAPE, rows=rows, columns=columns, tokens=tokens), 132)
            assert 1 <= launch.split <= max(1, columns // launch.turn)


def one(**changed: object) -> str:
    """A file of one entry, with something amiss in it or in its launch."""
    entry = tuned(SHAPE).document()
    for name, value in changed.items():
        (entry["launch"] if name in entry["launch"] and name != "rows" else entry)[name] = value
    return json.dumps({"gpu": "Some GPU", "versions": VERSIONS, "launches": [entry]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        ("[1]", "indices"),
        ("{}", "nothing there is called 'gpu'"),
        (b"\xff\xfe", "decode"),
        ('{"gpu": "Some GPU", "launches": []}', "versions"),
        ('{"gpu": "Some GPU", "versions": [3], "launches": []}', "attribute 'get'"),
        ('{"gpu": "Some GPU", "versions": {"weight_only": 3}, "launches": [3]}', "subscriptable"),
        (one(kernel="marlin"), "no kernel 'marlin'"),
        (one(launch={"rows": 64}), "nothing there is called 'tokens'"),
        (one(dense_us=None), "float"),
        (one(time_us=float("nan")), "times that cannot be"),
        (one(time_us=0), "times that cannot be"),
        (one(rows="28672"), "a shape that cannot be"),
        (one(columns=-1), "a shape that cannot be"),
        (one(group=48), "a shape that cannot be"),
        (one(split=2.5), "a launch that cannot be"),
        (one(warps=4.0), "a launch that cannot be"),
        (one(early="no"), "a launch that cannot be"),
        (one(overlapped=True), "a launch that cannot be"),  # of 64 rows, by two warps
        (one(launch=asdict(replace(WIDE, stages=2)) | {"stages": 1}), "a launch that cannot be"),
        (one(stages=8, turn=256, launch=asdict(replace(LAUNCH, tokens=256, stages=8))), "memory"),
        (one().replace("Some GPU", "Another"), "of 'Another', not of 'Some GPU'"),
    ],
    ids=range(23),
)
def test_damaged_data_are_left_aside_with_a_warning(
    own: Path, text: str | bytes, words: str
) -> None:
    file = own / launches.file_name("Some GPU")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=rf"{own}/Some_GPU.json are left aside .*{words}") as told:
        assert choose(SHAPE, "Some GPU", 100) == usual(SHAPE, 100)
        choose(replace(SHAPE, tokens=64), "Some GPU", 100)
    assert len(told) == 1


def test_a_folder_that_is_not_there_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(own / "elsewhere"))
    with pytest.warns(UserWarning, match=f"elsewhere are left aside .{FOLDER_VARIABLE}"):
        assert launches.load(H200)


def test_own_data_go_before_those_shipped_which_stand_for_all_else(own: Path) -> None:
    shipped = launches.load(H200)
    launches._load.cache_clear()
    first = shipped[0].shape
    written(own, H200, [tuned(first)])
    known = {entry.shape: entry for entry in launches.load(H200)}
    assert known[first] == tuned(first)
    assert [known[entry.shape] for entry in shipped[1:]] == shipped[1:]


def test_own_data_of_another_version_leave_what_is_shipped(own: Path) -> None:
    wanted = launches.load(H200)
    launches._load.cache_clear()
    written(own, H200, [tuned(SHAPE, OTHER)], weight_only=0)
    with pytest.warns(UserWarning, match=f"{own}/NVIDIA_H200.json .*another version of weight_on"):
        assert launches.load(H200) == wanted


def test_a_planner_is_told_where_a_bfloat16_weight_is_faster(own: Path) -> None:
    slow = replace(tuned(replace(SHAPE, tokens=256)), time_us=40.0)
    written(own, "Some GPU", [tuned(SHAPE), slow])
    for tokens, ratio in ((1, 2.0), (8, 2.0), (200, 0.5), (512, 0.5)):
        found = nearest(replace(SHAPE, rows=4096, tokens=tokens), "Some GPU")
        assert found is not None and found.ratio == ratio
    assert nearest(replace(SHAPE, tokens=8192), "Some GPU") is None  # too far
    assert nearest(SHAPE, "Another") is None


def test_data_of_another_version_of_one_kernel_leave_those_of_others(own: Path) -> None:
    other = replace(SHAPE, kernel="w8a8", codes="int8", group=0)
    written(own, "Some GPU", [tuned(SHAPE), tuned(other)], weight_only=0)
    with pytest.warns(UserWarning, match=r"Some_GPU.json .*of another version of weight_only\)"):
        assert choose(SHAPE, "Some GPU", 100) == usual(SHAPE, 100)
    assert choose(other, "Some GPU", 100) == LAUNCH


def test_a_launch_that_cannot_be_is_refused() -> None:
    document = json.loads(json.dumps(tuned(SHAPE).document()))
    document["launch"]["rows"] = 48
    with pytest.raises(ValueError, match="cannot be"):
        Tuned.of(document)


def test_bad_own_data_leave_what_is_shipped(own: Path) -> None:
    (own / launches.file_name(H200)).write_text("{")
    with pytest.warns(UserWarning, match="left aside"):
        assert launches.load(H200)


def test_what_is_shipped_can_be_read_and_is_better_than_dense() -> None:
    folder = files("quantkernels") / "tuned"
    shipped = [file for file in folder.iterdir() if file.name.endswith(".json")]
    assert {file.name for file in shipped} >= {"NVIDIA_H200.json", "NVIDIA_H100_80GB_HBM3.json"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in shipped:
            gpu = json.loads(file.read_text())["gpu"]
            assert launches.file_name(gpu) == file.name
            entries = parse(file.read_text(), gpu, file.name)
            shapes = [entry.shape for entry in entries]
            assert len(set(shapes)) == len(shapes)
            assert all(entry.ratio > 1 for entry in entries if entry.shape.tokens <= 32)
            assert all(entry.ratio > 0.95 for entry in entries if entry.shape.tokens <= 64)
