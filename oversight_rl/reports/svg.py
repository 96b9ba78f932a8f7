"""Figures as SVG: values for who points at a mark, words for who cannot see, panels that flow."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from matplotlib.figure import Figure

from oversight_rl.reports.figures import HOVER

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
XML = '<?xml version="1.0" encoding="utf-8"?>\n'
MARGIN, WIDER = 4.0, 1.04  # points around a piece, and a share: browsers' letters may be wider
PIXEL = 0.75  # points
GROWS = 1.2  # so much a panel may, where there is room
MOST_TEXTS = 80  # marks that a description tells of


@dataclass(frozen=True)
class Drawing:
    """A figure as a file, and as pieces that a page puts one after another."""

    whole: str
    pieces: list[str]
    """`<svg>` elements: the legends, and each panel."""
    width: float
    """Of a panel, in pixels."""


def drawing(figure: Figure, name: str, title: str, text: str) -> Drawing:
    """Draw a figure.

    Args:
        figure: whose artists say what is hovered, see `figures.hover`.
        name: begins the ids of its pieces.
        title: names it.
        text: describes it.
    """
    parts: list[Any] = [*figure.legends, *figure.axes]
    for i, part in enumerate(parts):
        part.set_gid(f"piece-{i}")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # all has its place by now
    source = io.StringIO()
    figure.savefig(source, format="svg", transparent=True, metadata={"Date": None})
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(source.getvalue())
    groups = {group.get("id", ""): group for group in root.iter(_tag("g"))}
    told = {part: list(_speak(group)) for part, group in groups.items() if "piece-" in part}
    _drop_ids(root)
    whole = _named(ET.fromstring(ET.tostring(root)), name, title, text)
    shared = {path.get("id"): path for path in root.iter(_tag("clipPath"))}
    boxes = [part.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()) for part in parts]
    panels = boxes[len(figure.legends) :]  # of one size, so that they are shown at one scale
    size = max(box.width for box in panels), max(box.height for box in panels)
    pieces = []
    for i, (part, box) in enumerate(zip(parts, boxes, strict=True)):
        legend = part in figure.legends
        width, height = (box.width, box.height) if legend else size
        left, top = 72 * box.x0 - MARGIN, 72 * (figure.get_figheight() - box.y1) - MARGIN
        width, height = 72 * width * WIDER + 2 * MARGIN, 72 * height + 2 * MARGIN
        group = groups[f"piece-{i}"]
        piece = ET.Element(_tag("svg"), viewBox=f"{left:.1f} {top:.1f} {width:.1f} {height:.1f}")
        piece.set("style", f"max-width: {width * GROWS / PIXEL:.0f}px")
        if legend:
            piece.set("class", "legend")
        clips = ET.SubElement(piece, _tag("defs"))
        for used in sorted(set(re.findall(r"url\(#([^)]+)\)", ET.tostring(group, "unicode")))):
            if used in shared:  # one of an id in a page is enough
                clips.append(shared.pop(used))
        piece.append(group)
        own = "" if legend else part.get_title().replace("\n", ", ")
        what = f"{title}: {own}" if own else title
        more = "; ".join(told.get(f"piece-{i}", [])[:MOST_TEXTS])
        pieces.append(_named(piece, f"{name}-{i}", what, f"{text} {more}".strip()))
    return Drawing(XML + whole, pieces, 72 * size[0] / PIXEL)


def _tag(name: str) -> str:
    return f"{{{SVG}}}{name}"


def _speak(piece: ET.Element) -> Iterator[str]:
    """Put texts where a pointer may rest, each in a `title`; yields them."""
    for group in piece.iter(_tag("g")):
        name = group.get("id", "")
        if not name.startswith(HOVER):
            continue
        texts = json.loads(name.removeprefix(HOVER))
        marks = list(group.iter(_tag("use")))
        if len(marks) != len(texts):  # no marks, or some lie outside
            marks, texts = [group], ["\n".join(texts)]
        for mark, text in zip(marks, texts, strict=True):
            title = ET.Element(_tag("title"))
            title.text = text
            mark.insert(0, title)
            yield text


def _drop_ids(root: ET.Element) -> None:
    """Leave the ids that something refers to: all others are alike in all figures."""
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", ET.tostring(root, "unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _named(svg: ET.Element, name: str, title: str, text: str) -> str:
    """An SVG as text, with a role, a title and a description."""
    svg.set("role", "img")
    svg.set("aria-labelledby", f"{name}-title {name}-text")
    for i, (tag, content) in enumerate((("title", title), ("desc", text))):
        element = ET.Element(_tag(tag), id=f"{name}-{'text' if i else 'title'}")
        element.text = content
        svg.insert(i, element)
    return ET.tostring(svg, "unicode")
