"""The profile of a job (profile.py) as a picture: a lane for each block.

A lane's bar is the worker-seconds of its block, one colour for each part. The thin line below it is
what threads did meanwhile: reading ahead and writing behind, as far as nobody waited for it.
The picture stands by itself: no script, nothing that it would fetch, light or dark as its reader
has it. Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color), which differ to
every kind of colour vision.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.svg import Drawing, Group

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Look:
    name: str
    fill: str
    ink: str  # of text upon it
    what: str


_LOOKS = {
    "read": _Look("read", "#56b4e9", "#000", "weights, and hidden states from elsewhere"),
    "forward": _Look("forward", "#0072b2", "#fff", "the calibration texts through the block"),
    "hessian": _Look("Hessian", "#009e73", "#000", "sums over the inputs of its linears"),
    "factor": _Look("factor", "#f0e442", "#000", "the Hessians, damped and factored"),
    "solve": _Look("solve", "#d55e00", "#000", "scales and codes"),
    "pack": _Look("pack", "#cc79a7", "#000", "codes to the stored format, and back"),
    "write": _Look("write", "#e69f00", "#000", "the block to the store, and what is kept"),
    "waiting": _Look("waiting", "#b8bcc2", "#000", "without a task, or without its inputs"),
    "lost": _Look("lost", "#4d4d4d", "#fff", "with workers that were lost"),
}

_WIDTH, _MARGIN = 960.0, 28.0
_LEFT, _RIGHT = 104.0, 768.0  # where bars begin, and where the longest ends
_SUMS_AT, _CLOCK_AT = 850.0, _WIDTH - _MARGIN  # where the columns of numbers end
_CHARACTER = 7.0  # about as wide
_LONGEST_NAME = 64  # characters of a job's name that a line holds
_LEGEND_COLUMNS, _LEGEND_PITCH = 3, 40.0
_MOST_OUTSIDE = 1.5  # of the longest block: a longer lane has a scale of its own

_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; }
text { fill: #1f2328; font-variant-numeric: tabular-nums; }
.paper { fill: #ffffff; }
.title { font-size: 19px; font-weight: 600; }
.small { font-size: 10.5px; }
.strong { font-weight: 600; }
.quiet { fill: #57606a; }
.note { font-style: italic; stroke: #ffffff; stroke-width: 4px; paint-order: stroke; }
.axis line { stroke: #d0d7de; }
.bar { stroke: #ffffff; stroke-width: 0.75; }
.ink-light { fill: #ffffff; }
.ink-dark { fill: #000000; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8eb; }
  .paper { fill: #16191d; }
  .quiet { fill: #a3abb5; }
  .note { stroke: #16191d; }
  .axis line { stroke: #3a4048; }
  .bar { stroke: #16191d; }
  .ink-light { fill: #ffffff; }
  .ink-dark { fill: #000000; }
}
"""


@dataclass(frozen=True, slots=True)
class _Lane:
    label: str
    row: Data

    @property
    def seconds(self) -> float:
        return float(sum(self.row["seconds"].values()))


class _Scale:
    """Seconds to pixels, and round numbers of seconds to mark."""

    def __init__(self, longest: float) -> None:
        self.longest = longest or 1.0
        rough = self.longest / 6
        power = 10.0 ** math.floor(math.log10(rough))
        self.step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
        self.per_second = (_RIGHT - _LEFT) / self.longest

    def marks(self) -> Iterator[tuple[float, str]]:
        """Where they are, and what they say."""
        digits = max(0, -math.floor(math.log10(self.step)))
        for number in range(math.floor(self.longest / self.step) + 1):
            seconds = number * self.step
            yield _LEFT + seconds * self.per_second, f"{seconds:.{digits}f} s"


def draw(job: str, profile: Data) -> bytes:
    """The picture of a report's `profile`."""
    summary, spent = _summary(profile), profile["total"]["seconds"]
    parts = sorted(spent, key=lambda part: -spent[part])
    told = ", ".join(f"{_LOOKS[part].name} {_time(spent[part])}" for part in parts)
    drawing = Drawing(f"Where the time of {job} went", f"{summary}. {told}.", _STYLE)
    head = drawing.group("head")
    name = job if len(job) <= _LONGEST_NAME else job[: _LONGEST_NAME - 1] + "…"
    drawing.text(head, _MARGIN, 42.0, f"Where the time went: {name}", "title")
    drawing.text(head, _MARGIN, 64.0, summary, "quiet")
    below = _total(drawing, profile, 82.0)
    below = _lanes(drawing, profile, below + 22)
    return drawing.done(_WIDTH, math.ceil(_notes(drawing, profile, below + 20)))


def _total(drawing: Drawing, profile: Data, top: float) -> float:
    """The whole job as one bar, and a legend with what each part came to. Where that ends."""
    spent, hidden = profile["total"]["seconds"], profile["total"]["hidden"]
    whole = sum(spent.values()) or 1.0
    width = _WIDTH - 2 * _MARGIN
    bar = drawing.group("total")
    _segments(drawing, bar, _Lane("all blocks", profile["total"]), _MARGIN, top, 26, width / whole)
    legend = drawing.group("legend")
    shown = [part for part in _LOOKS if part in spent or part != "lost"]
    rows = -(-len(shown) // _LEGEND_COLUMNS)
    for number, part in enumerate(shown):
        column, row = divmod(number, rows)
        x = _MARGIN + column * width / _LEGEND_COLUMNS
        y = top + 44 + row * _LEGEND_PITCH
        look, seconds = _LOOKS[part], spent.get(part, 0.0)
        drawing.box(legend, x, y, 12.0, 12.0, rx=2, fill=look.fill)
        drawing.text(legend, x + 19, y + 10.5, look.name, "strong")
        drawing.text(legend, x + 134, y + 10.5, _time(seconds), text_anchor="end")
        drawing.text(legend, x + 176, y + 10.5, _share(seconds / whole), "quiet", text_anchor="end")
        if part in hidden:
            drawing.text(legend, x + 188, y + 10.5, f"+ {_time(hidden[part])} hidden", "quiet")
        drawing.text(legend, x + 19, y + 25, look.what, "small quiet")
    return top + 44 + rows * _LEGEND_PITCH


def _lanes(drawing: Drawing, profile: Data, top: float) -> float:
    lanes = [_Lane(f"block {row['block']}", row) for row in profile["blocks"]]
    outside = _Lane("outside", profile["outside"])
    longest = max((lane.seconds for lane in lanes), default=0.0)
    apart = outside.seconds > _MOST_OUTSIDE * longest > 0
    scale = _Scale(longest if apart else max(longest, outside.seconds))
    pitch = _pitch(len(lanes))
    bottom = top + 10 + (len(lanes) + 1.6) * pitch
    axis = drawing.group("axis")
    for text, x in (("workers' time", _SUMS_AT), ("by the clock", _CLOCK_AT)):
        drawing.text(axis, x, top, text, "small quiet", text_anchor="end")
    for x, mark in scale.marks():
        drawing.upright(axis, x, top + 6, bottom)
        drawing.text(axis, x, bottom + 14, mark, "small quiet", text_anchor="middle")
    for number, lane in enumerate(lanes):
        note = "published by an earlier run" if lane.row["earlier"] else ""
        _lane(drawing, lane, top + 10 + number * pitch, pitch, scale, note)
    own = _Scale(outside.seconds / 0.7) if apart else scale
    note = "by a scale of its own" if apart else ""
    _lane(drawing, outside, top + 10 + (len(lanes) + 0.6) * pitch, pitch, own, note)
    return bottom + 14


def _lane(
    drawing: Drawing, lane: _Lane, top: float, pitch: float, scale: _Scale, note: str
) -> None:
    group = drawing.group("lane")
    size = "small" if pitch < 18 else ""
    height = round(0.58 * pitch)
    line = top + height / 2 + (3.6 if size else 4.2)
    drawing.text(group, _LEFT - 10, line, lane.label, size, text_anchor="end")
    _segments(drawing, group, lane, _LEFT, top, height, scale.per_second)
    if note:
        x = _LEFT + lane.seconds * scale.per_second + 8
        drawing.text(group, x, line, note, f"note {size} quiet")
    if lane.seconds:
        drawing.text(group, _SUMS_AT, line, _time(lane.seconds), size, text_anchor="end")
    if wall := lane.row.get("wall_seconds"):
        drawing.text(group, _CLOCK_AT, line, _time(wall), f"{size} quiet", text_anchor="end")
    x = _LEFT
    for part, seconds in lane.row["hidden"].items():
        width = min(seconds * scale.per_second, _RIGHT - x)
        hint = f"{lane.label}: {_LOOKS[part].name}, hidden, {_time(seconds)}"
        fill = _LOOKS[part].fill
        drawing.box(group, x, top + height + 1.5, width, 0.14 * pitch, hint=hint, fill=fill)
        x += width


def _segments(
    drawing: Drawing,
    group: Group,
    lane: _Lane,
    x: float,
    top: float,
    height: float,
    per_second: float,
) -> None:
    for part, look in _LOOKS.items():
        seconds = lane.row["seconds"].get(part, 0.0)
        width = seconds * per_second
        if not seconds:
            continue
        hint = f"{lane.label}: {look.name} {_time(seconds)}, {_share(seconds / lane.seconds)}"
        drawing.box(group, x, top, width, height, hint=hint, cls="bar", fill=look.fill)
        if height >= 16 and width > (len(look.name) + 2) * _CHARACTER:
            ink = "ink-light" if look.ink == "#fff" else "ink-dark"
            line = top + height / 2 + 4.2
            drawing.text(group, x + width / 2, line, look.name, ink, text_anchor="middle")
        x += width


def _notes(drawing: Drawing, profile: Data, top: float) -> float:
    lines = [
        "A bar adds up the time of all workers. By the clock: while anyone had a task of the "
        "block; blocks overlap.",
        "Outside: texts and embeddings, and workers before their first task and after their last.",
    ]
    if profile["total"]["hidden"]:
        lines.append(
            "Thin lines: read ahead or written behind while the workers went on. What they waited "
            "for of it is in the bar."
        )
    notes = drawing.group("notes")
    for number, line in enumerate(lines):
        drawing.text(notes, _MARGIN, top + 16 * (number + 1), line, "small quiet")
    return top + 16 * len(lines) + _MARGIN


def _pitch(blocks: int) -> float:
    """How far apart lanes are: many stand close, but not so that their labels touch."""
    return 34.0 if blocks <= 8 else 22.0 if blocks <= 40 else 15.0


def _summary(profile: Data) -> str:
    workers, wall = profile["workers"], profile["wall_seconds"]
    done = sum(not row["earlier"] for row in profile["blocks"])
    told = f"{_many(done, 'block')} quantized by {_many(workers, 'worker')} in {_time(wall)}"
    if workers > 1:
        told += f", {_time(sum(profile['total']['seconds'].values()))} of workers' time"
    earlier = len(profile["blocks"]) - done
    return f"{told}; {_many(earlier, 'block')} by an earlier run" if earlier else told


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _share(part: float) -> str:
    return "<1%" if 0 < part < 0.005 else f"{100 * part:.0f}%"


def _time(seconds: float) -> str:
    """Three digits or so."""
    if seconds >= 6000:
        return f"{seconds / 3600:.1f} h"
    if 0 < seconds < 0.005:
        return "<0.01 s"
    digits = 0 if seconds >= 100 or not seconds else 1 if seconds >= 10 else 2
    return f"{seconds:.{digits}f} s"
