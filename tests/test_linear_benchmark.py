"""The benchmark of linears: its table on a CPU, its gate, and its picture."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import Tensor

from tests.benchmarks import linear_gpu, linear_peers
from tests.benchmarks.linear_kernels import OURS, Built, Kernel, product
from tests.benchmarks.linear_picture import draw
from tests.benchmarks.linear_timing import timed

RESULTS = Path(linear_gpu.__file__).parent / "results"

SVG = "{http://www.w3.org/2000/svg}"
CPU = ["--device", "cpu", "--tokens", "1", "2", "--passes", "2"]


def ours(monkeypatch: pytest.MonkeyPatch, build: Callable[[Tensor], Built]) -> None:
    kernel = Kernel(by="ours", scheme="int8", build=build, devices=("cpu",))
    monkeypatch.setattr(linear_gpu, "OURS", [kernel])


def records(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["shapes"][0]["records"]
    return found


def test_every_kernel_of_a_cpu_is_held_to_float64_and_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    told = ["--json", str(out), "--svg", str(picture)]
    linear_gpu.main([*CPU, "--shapes", "64x128", *told])
    printed = capsys.readouterr().out
    labels = {kernel.label for kernel in OURS} | {"tinygemm int4 g128", "tinygemm int4 g64"}
    assert {f"{row['by']} {row['scheme']}" for row in records(out)} == {"torch bf16", *labels}
    for row in records(out):
        assert row["error"] < 5e-3
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["p50_us"] == min(row["passes_us"])
        assert len(row["passes_us"]) == 2
        assert re.search(rf"{row['by']} {row['scheme']} +[\d.]+ +{row['p50_us']:.2f} ", printed)
    for absent in ("gemlite", "torchao", "marlin", "machete"):
        assert re.search(rf"{absent} +missing", printed)
    drawn = ET.fromstring(picture.read_bytes())
    assert len(drawn.findall(f"{SVG}g[@class='lines']/{SVG}polyline")) == len(labels)


def test_a_run_comes_in_pieces_that_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for shape, tokens in (("64x128", "12"), ("32x64", "1"), ("64x128", "23")):
        told = [*CPU, "--shapes", shape, "--kernels", "ours int8 dynamic", "--json", str(out)]
        linear_gpu.main([*told, "--tokens", *tokens])
    first, second = json.loads(out.read_text())["shapes"]
    assert (first["rows"], second["rows"]) == (64, 32)
    assert [row["tokens"] for row in first["records"]] == [1] * 3 + [2] * 3 + [3] * 3
    assert [run["tokens"] for run in first["runs"]] == [[2, 3], [1]]
    assert [row["tokens"] for row in second["records"]] == [1] * 3


@pytest.mark.parametrize("off", [1.05, float("nan")])
def test_a_kernel_that_is_wrong_gets_no_time(
    off: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(w_OI: Tensor) -> Built:
        return Built(
            multiply=partial(product, weight=w_OI * off), values_OI=w_OI.float(), num_bytes=1
        )

    ours(monkeypatch, build)
    out = tmp_path / "out.json"
    linear_gpu.main([*CPU, "--shapes", "64x128", "--kernels", "ours", "--json", str(out)])
    assert capsys.readouterr().out.count("WRONG") == 2
    for row in records(out)[1::2]:
        assert row["wrong"].startswith("relative error")
        assert "p50_us" not in row


def test_a_kernel_that_does_not_run_is_told_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(w_OI: Tensor) -> Built:
        raise NotImplementedError("rows by 96\nand more")

    ours(monkeypatch, build)
    out = tmp_path / "out.json"
    linear_gpu.main([*CPU, "--shapes", "64x128", "--kernels", "ours", "--json", str(out)])
    assert "failed: (64, 128) ours int8: NotImplementedError: rows by 96\n" in (
        capsys.readouterr().out
    )
    assert [row.get("failed") for row in records(out)[1::2]] == [
        "NotImplementedError: rows by 96"
    ] * 2


def test_figures_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    before = '{"machine": {"device": "another"}, "shapes": []}'
    out.write_text(before)
    with pytest.raises(SystemExit, match=r"another.*write another name"):
        linear_gpu.main([*CPU, "--shapes", "64x128", "--json", str(out)])
    assert out.read_text() == before
    with pytest.raises(SystemExit, match="a part of one of ours int4 g128"):
        linear_gpu.main([*CPU, "--shapes", "64x128", "--kernels", "int5"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("out.json", "{", "out.json is no document of this command's .Expecting"),
        ("out.json", "{}", "out.json is no document of this command's .'shapes'"),
        ("nowhere/out.json", None, "nowhere/out.json is in no folder that is there"),
    ],
)
def test_a_document_that_cannot_be_is_refused_before_anything_is_timed(
    tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=words):
        linear_gpu.main([*CPU, "--shapes", "64x128", "--json", str(tmp_path / name)])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_in_the_order_of_gptq(bits: int) -> None:
    codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64), dtype=torch.int8)
    words = linear_peers._words(codes_OI, bits)
    assert words.dtype == torch.int32
    for row, column in ((0, 0), (23, 63), (5, 8 * 3 + 7)):
        word, place = divmod(column, 32 // bits)
        code = (int(words[word, row]) >> (bits * place)) % 2**bits
        assert code - 2 ** (bits - 1) == codes_OI[row, column]


def document(*ratios: float) -> dict[str, Any]:
    rows = [
        {"by": "ours", "scheme": "int8", "tokens": 4**place, "ratio": ratio}
        for place, ratio in enumerate(ratios)
    ]
    failed = {"by": "gemlite", "scheme": "int8", "tokens": 1, "failed": "no <&> luck"}
    runs = [{"tokens": [1], "missing": {"torchao": "not here"}}]
    shape = {"rows": 64, "columns": 128, "runs": runs, "records": [*rows, failed]}
    return {"machine": {"device": "one <GPU>", "torch": "2.11"}, "shapes": [shape] * 3}


def test_lines_rise_by_as_much_for_each_doubling_and_stay_in_their_panel() -> None:
    drawn = ET.fromstring(draw(document(0.5, 1.0, 2.0, 1e-9, 1e9)))
    lines = drawn.findall(f"{SVG}g[@class='lines']/{SVG}polyline")
    assert len(lines) == 3
    even = drawn.findall(f"{SVG}g[@class='even']/{SVG}polyline")
    for line, level in zip(lines, even, strict=True):
        places = [tuple(map(float, at.split(","))) for at in line.attrib["points"].split()]
        (x0, y0), (x1, y1), (x2, y2), (_, lowest), (_, highest) = places
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
        assert y0 > y1 > y2
        assert y1 == pytest.approx(float(level.attrib["points"].split()[0].split(",")[1]))
        assert lowest - highest == pytest.approx(240, abs=0.1)
    width, height = (float(drawn.attrib[side]) for side in ("width", "height"))
    for text in drawn.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) <= width
        assert 0 < float(text.attrib["y"]) <= height


def test_what_is_not_drawn_is_named() -> None:
    told = "".join(ET.fromstring(draw(document(1.0))).itertext())
    assert "Missing here: torchao." in told
    assert "3 rows failed or were wrong, the first of them gemlite int8 at 1." in told


@pytest.mark.parametrize("path", sorted(RESULTS.glob("linears-*.json")), ids=lambda path: path.stem)
def test_a_picture_that_is_kept_is_that_of_its_figures(path: Path) -> None:
    document = json.loads(path.read_text())
    assert path.with_suffix(".svg").read_bytes() == draw(document)
    ours = [r for of in document["shapes"] for r in of["records"] if r["by"] == "ours"]
    assert ours and not any("wrong" in record or "failed" in record for record in ours)


class Slowing:
    """A replay of 10 milliseconds, and of 20 once it has run for 50: a clock that comes down."""

    calls = (lambda: None,)
    ran = 0

    def __call__(self, repeats: int = 1) -> list[float]:
        self.ran += repeats
        return [1e4 if at < 5 else 2e4 for at in range(self.ran - repeats, self.ran)]


def test_a_row_that_is_settled_is_timed_by_the_clock_that_it_leaves() -> None:
    assert timed(Slowing()).p20_us == 1e4
    assert timed(Slowing(), settled=True).p20_us == 2e4
