"""The picture of a profile: well-formed, to scale, readable, and whole in itself."""

import itertools
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from orchestrator.picture import _LOOKS, draw
from orchestrator.profile import PARTS

SVG = "{http://www.w3.org/2000/svg}"
_SECONDS = {"read": 0.1, "forward": 6.0, "hessian": 3.9, "factor": 1.3, "solve": 3.2, "pack": 0.5}


def profile(blocks: int, **outside: float) -> dict[str, Any]:
    rows = [
        {
            "block": block,
            "earlier": False,
            "wall_seconds": 2.0 + block,
            "seconds": {part: s * (1 + block % 3) for part, s in _SECONDS.items()},
            "hidden": {"read": 1.5, "write": 0.5},
        }
        for block in range(blocks)
    ]
    total: dict[str, float] = {}
    for row in [*rows, {"seconds": outside}]:
        for part, seconds in row["seconds"].items():
            total[part] = total.get(part, 0.0) + seconds
    return {
        "workers": 2,
        "wall_seconds": 40.0,
        "total": {"seconds": total, "hidden": {"read": 1.5 * blocks, "write": 0.5 * blocks}},
        "blocks": rows,
        "outside": {"seconds": outside, "hidden": {}},
    }


def drawn(told: dict[str, Any], job: str = "a-job") -> ET.Element:
    return ET.fromstring(draw(job, told))


def lanes(picture: ET.Element) -> list[ET.Element]:
    return picture.findall(f"{SVG}g[@class='lane']")


def bars(lane: ET.Element) -> list[ET.Element]:
    return lane.findall(f"{SVG}rect[@class='bar']")


def number(element: ET.Element, name: str) -> float:
    return float(element.attrib[name])


@pytest.mark.parametrize("blocks", [0, 1, 2, 9, 41, 126])
def test_each_block_has_a_lane_and_each_part_a_bar_to_scale(blocks: int) -> None:
    told = profile(blocks, forward=2.0, waiting=1.0)
    *of_blocks, outside = lanes(drawn(told))
    assert len(of_blocks) == blocks
    assert len(bars(outside)) == 2
    scales = []
    for row, lane in zip(told["blocks"], of_blocks, strict=True):
        assert lane.findtext(f"{SVG}text") == f"block {row['block']}"
        widths = [number(bar, "width") for bar in bars(lane)]
        assert len(widths) == len(row["seconds"])
        scales += [w / s for w, s in zip(widths, row["seconds"].values(), strict=True)]
        ends = [number(bar, "x") + number(bar, "width") for bar in bars(lane)]
        starts = [number(bar, "x") for bar in bars(lane)]
        assert starts[1:] == pytest.approx(ends[:-1], abs=0.02)
    assert scales == pytest.approx([scales[0]] * len(scales), rel=0.01) if scales else True


@pytest.mark.parametrize("blocks", [1, 2, 9, 41, 126])
@pytest.mark.parametrize("waiting", [0.0, 0.001, 1.0, 5000.0])
def test_nothing_lies_outside_of_the_picture_and_no_label_on_another(
    blocks: int, waiting: float
) -> None:
    picture = drawn(profile(blocks, waiting=waiting))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for rect in picture.iter(f"{SVG}rect"):
        if rect.attrib.get("class") != "paper":
            assert number(rect, "x") + number(rect, "width") <= width
            assert number(rect, "y") + number(rect, "height") <= height
    for text in picture.iter(f"{SVG}text"):
        assert 0 < number(text, "x") <= width
        assert 0 < number(text, "y") <= height
    size = 10.5 if blocks > 40 else 12.0
    labels = [number(next(lane.iter(f"{SVG}text")), "y") for lane in lanes(picture)]
    assert all(b - a > size for a, b in itertools.pairwise(labels))
    for above, below in itertools.pairwise(lanes(picture)):
        lowest = max(number(r, "y") + number(r, "height") for r in above.iter(f"{SVG}rect"))
        assert all(lowest < number(bar, "y") for bar in bars(below))


def test_a_long_time_outside_of_blocks_does_not_make_the_blocks_small() -> None:
    *of_blocks, outside = lanes(drawn(profile(3, waiting=9000.0)))
    longest = max(sum(number(bar, "width") for bar in bars(lane)) for lane in of_blocks)
    assert longest == pytest.approx(768 - 104, abs=1)
    assert "by a scale of its own" in "".join(outside.itertext())


def test_a_name_is_told_as_it_is() -> None:
    name = "<&> \"quoted\" 'job' ]]> \x00\x1b"
    picture = drawn(profile(2), name)
    shown = name[:-2]  # XML can't hold the last two
    assert picture.findtext(f"{SVG}title") == f"Where the time of {shown} went"
    assert f"Where the time went: {shown}" in [t.text for t in picture.iter(f"{SVG}text")]
    long = drawn(profile(2), "x" * 300)
    assert max(len(text.text or "") for text in long.iter(f"{SVG}text")) < 160
    assert "x" * 300 in (long.findtext(f"{SVG}title") or "")


def test_who_does_not_see_the_picture_is_told_what_it_shows() -> None:
    picture = drawn(profile(2, lost=1.0))
    named = picture.attrib["aria-labelledby"].split()
    assert {picture.find(f"*[@id='{name}']") is not None for name in named} == {True}
    told = picture.findtext(f"{SVG}desc") or ""
    assert "2 blocks quantized by 2 workers in 40.0 s" in told
    assert "forward 18.0 s, Hessian 11.7 s" in told  # the largest first
    hints = [title.text for title in lanes(picture)[0].iter(f"{SVG}title")]
    assert "block 0: forward 6.00 s, 40%" in hints
    assert "block 0: read, hidden, 1.50 s" in hints


def test_the_picture_stands_by_itself() -> None:
    text = draw("a-job", profile(3)).decode()
    assert not re.search(r"<script|href|url\(|@import|@font-face|\son\w+=", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_a_job_that_spent_nothing_is_drawn_too() -> None:
    nothing = {"seconds": {}, "hidden": {}}
    row = {"block": 0, "earlier": True, "wall_seconds": 0.0, **nothing}
    told = {"workers": 1, "wall_seconds": 0.0, "total": nothing, "blocks": [row]}
    picture = drawn({**told, "outside": nothing})
    assert "published by an earlier run" in "".join(picture.itertext())


def test_every_part_has_a_look_of_its_own() -> None:
    assert tuple(_LOOKS) == PARTS
    assert len({look.fill for look in _LOOKS.values()}) == len(PARTS)
    for look in _LOOKS.values():  # by WCAG 2.2, 1.4.3
        lighter, darker = sorted((_luminance(look.fill), _luminance(look.ink)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, look.name


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
