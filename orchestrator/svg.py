"""Shapes and texts of a picture, in SVG. What is drawn later lies above."""

from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree as ET

Group = ET.Element


class Drawing:
    """`title` and `description` are for those who don't see it. `style` may name any class."""

    def __init__(self, title: str, description: str, style: str) -> None:
        self._svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        self._svg.set("aria-labelledby", "title description")
        _add(self._svg, "title", printable(title), id="title")
        _add(self._svg, "desc", printable(description), id="description")
        _add(self._svg, "style", style)
        _add(self._svg, "rect", cls="paper", width="100%", height="100%")

    def group(self, cls: str) -> Group:
        return _add(self._svg, "g", cls=cls)

    def box(self, group: Group, *place: float, hint: str = "", **looks: Any) -> None:
        """At x, y, so wide and so high. A hint is shown where a pointer rests."""
        x, y, width, height = place
        box = _add(group, "rect", x=x, y=y, width=width, height=height, **looks)
        if hint:
            _add(box, "title", hint)

    def upright(self, group: Group, x: float, top: float, bottom: float) -> None:
        _add(group, "line", x1=x, x2=x, y1=top, y2=bottom)

    def curve(
        self, group: Group, points: Iterable[tuple[float, float]], *, hint: str = "", **looks: Any
    ) -> None:
        """Straight from point to point."""
        told = " ".join(f"{_plain(x)},{_plain(y)}" for x, y in points)
        curve = _add(group, "polyline", points=told, fill="none", **looks)
        if hint:
            _add(curve, "title", hint)

    def text(
        self, group: Group, x: float, y: float, text: str, cls: str = "", **looks: Any
    ) -> None:
        """On the line y, from x on; `text_anchor` end or middle, and it ends or has its middle."""
        _add(group, "text", printable(text), cls=cls, x=x, y=y, **looks)

    def done(self, width: float, height: float) -> bytes:
        for name, size in (("width", width), ("height", height)):
            self._svg.set(name, _plain(size))
        self._svg.set("viewBox", f"0 0 {_plain(width)} {_plain(height)}")
        drawn: bytes = ET.tostring(self._svg, encoding="utf-8", xml_declaration=True)
        return drawn + b"\n"


def printable(text: str) -> str:
    """Without the characters that XML can't hold."""
    return "".join(c for c in text if c.isprintable())


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: Any) -> ET.Element:
    told = {
        "class" if name == "cls" else name.replace("_", "-"): _plain(value)
        for name, value in attributes.items()
        if value != ""
    }
    element = ET.SubElement(parent, tag, told)
    element.text = text or None
    return element


def _plain(value: str | float) -> str:
    """A hundredth of a pixel is enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
