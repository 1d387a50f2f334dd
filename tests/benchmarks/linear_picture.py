"""What linear_gpu.py found as a picture: how many times bfloat16's speed, over tokens.

A panel a shape, a line a kernel: its colour is the scheme, its dashes are whose it is. Both axes
double from mark to mark; the strong line is bfloat16. Colours are those of Okabe and Ito (2008,
https://jfly.uni-koeln.de/color).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.svg import Drawing

Data = Mapping[str, Any]

_COLOURS = {
    "int4 g128": "#0072b2",
    "int4 g64": "#56b4e9",
    "int8": "#009e73",
    "float8": "#e69f00",
    "int8 dynamic": "#cc79a7",
    "float8 dynamic row": "#d55e00",
    "float8 dynamic tensor": "#8a8f98",
}
_DASHES = {
    "ours": "",
    "ours compiled": "14 2",
    "tinygemm": "2 3",
    "gemlite": "7 3",
    "torchao": "9 3 2 3",
    "marlin": "4 2",
    "machete": "1 2",
}
_WIDTH, _MARGIN, _GAP = 1120.0, 28.0, 56.0
_ACROSS, _HEIGHT = 2, 240.0  # panels in a row, and how high one is
_LEFT = 44.0  # of a panel, where its marks stand
_LEAST, _MOST = -5, 3  # powers of two; what is beyond lies on the border

_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; }
text { fill: #1f2328; font-variant-numeric: tabular-nums; }
.paper { fill: #ffffff; }
.title { font-size: 19px; font-weight: 600; }
.strong { font-weight: 600; }
.quiet { fill: #57606a; }
.grid polyline { stroke: #d0d7de; stroke-width: 1; }
.even polyline { stroke: #1f2328; stroke-width: 1.5; }
.sample polyline { stroke: #57606a; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8eb; }
  .paper { fill: #16191d; }
  .quiet { fill: #a3abb5; }
  .grid polyline { stroke: #3a4048; }
  .even polyline { stroke: #e6e8eb; }
}
"""


def draw(document: Data) -> bytes:
    """The picture of a document of linear_gpu.py."""
    shapes = document["shapes"]
    machine = document["machine"]
    title = f"Quantized linears on {machine['device']}, as multiples of bfloat16's speed"
    names = ", ".join(f"{shape['rows']} x {shape['columns']}" for shape in shapes)
    drawing = Drawing(title, f"A panel for each of {names}: ratios over tokens.", _STYLE)
    head = drawing.group("head")
    drawing.text(head, _MARGIN, 42.0, title, "title")
    told = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")
    drawing.text(head, _MARGIN, 64.0, told, "quiet")
    top = _legend(drawing, shapes, 86.0) + 36
    width = (_WIDTH - 2 * _MARGIN - (_ACROSS - 1) * _GAP) / _ACROSS
    for number, shape in enumerate(shapes):
        row, column = divmod(number, _ACROSS)
        x = _MARGIN + column * (width + _GAP)
        _panel(drawing, shape, x, top + row * (_HEIGHT + 64), width)
    below = top + math.ceil(len(shapes) / _ACROSS) * (_HEIGHT + 64)
    return drawing.done(_WIDTH, below + _notes(drawing, shapes, below))


def _lines(shape: Data) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """Whose, of what scheme, and its ratios by tokens."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in shape["records"]:
        if record.get("ratio") is not None and record["scheme"] != "bf16":
            line = found.setdefault((record["by"], record["scheme"]), [])
            line.append((record["tokens"], record["ratio"]))
    for (by, scheme), line in found.items():
        yield by, scheme, sorted(line)


def _legend(drawing: Drawing, shapes: Sequence[Data], top: float) -> float:
    lines = [(by, scheme) for shape in shapes for by, scheme, _ in _lines(shape)]
    legend = drawing.group("legend")
    x = _MARGIN
    for scheme, colour in _COLOURS.items():
        if any(scheme == drawn for _, drawn in lines):
            drawing.box(legend, x, top, 12.0, 12.0, rx=2, fill=colour)
            drawing.text(legend, x + 18, top + 10.5, scheme)
            x += 40 + 7.0 * len(scheme)
    samples = drawing.group("sample")
    x = _MARGIN
    for by, dashes in _DASHES.items():
        if any(by == drawn for drawn, _ in lines):
            drawing.curve(samples, [(x, top + 30), (x + 40, top + 30)], stroke_dasharray=dashes)
            drawing.text(samples, x + 46, top + 34, by)
            x += 74 + 7.0 * len(by)
    return top + 40


def _panel(drawing: Drawing, shape: Data, x: float, top: float, width: float) -> None:
    lines = list(_lines(shape))
    tokens = sorted({record["tokens"] for record in shape["records"]})
    ratios = [ratio for _, _, line in lines for _, ratio in line]
    powers = [math.log2(ratio) for ratio in ratios] or [0.0]
    low = max(_LEAST, min(-1, math.floor(min(powers))))
    high = min(_MOST, max(1, math.ceil(max(powers))))
    first, last = math.log2(tokens[0]), math.log2(tokens[-1])
    left, span = x + _LEFT, width - _LEFT

    def across(count: int) -> float:
        return left + span * (math.log2(count) - first) / (last - first or 1.0)

    def down(ratio: float) -> float:
        power = min(max(math.log2(ratio), low), high)
        return top + _HEIGHT * (high - power) / (high - low)

    marks = drawing.group("grid")
    drawing.text(marks, x, top - 12, f"{shape['rows']} x {shape['columns']}", "strong")
    for power in range(low, high + 1):
        y = down(2.0**power)
        drawing.curve(marks, [(left, y), (left + span, y)])
        label = str(2**power) if power >= 0 else f"1/{2**-power}"
        drawing.text(marks, left - 8, y + 4, label, "quiet", text_anchor="end")
    for count in tokens:
        drawing.text(
            marks, across(count), top + _HEIGHT + 18, str(count), "quiet", text_anchor="middle"
        )
    drawing.curve(drawing.group("even"), [(left, down(1.0)), (left + span, down(1.0))])
    curves = drawing.group("lines")
    for by, scheme, line in reversed(lines):  # ours come first, and lie on top
        told = ", ".join(f"{ratio:.2f} at {count}" for count, ratio in line)
        drawing.curve(
            curves,
            [(across(count), down(ratio)) for count, ratio in line],
            hint=f"{by} {scheme}: {told}",
            stroke=_COLOURS.get(scheme, "#8a8f98"),
            stroke_width=2.5 if by == "ours" else 1.5,
            stroke_dasharray=_DASHES.get(by, ""),
        )


def _notes(drawing: Drawing, shapes: Sequence[Data], top: float) -> float:
    """What is not drawn, and why. How high that is."""
    runs = [run for shape in shapes for run in shape["runs"]]
    absent = dict.fromkeys(name for run in runs for name in run["missing"])
    amiss = [
        f"{record['by']} {record['scheme']} at {record['tokens']}"
        for shape in shapes
        for record in shape["records"]
        if "failed" in record or "wrong" in record
    ]
    lines = ["Across: tokens. Above 1 is faster than bfloat16."]
    if absent:
        lines.append(f"Missing here: {', '.join(absent)}.")
    if amiss:
        lines.append(f"{len(amiss)} rows failed or were wrong, the first of them {amiss[0]}.")
    notes = drawing.group("notes")
    for number, line in enumerate(lines):
        drawing.text(notes, _MARGIN, top + 16 * number, line, "quiet")
    return 16.0 * len(lines) + _MARGIN
