"""Matplotlib figures as SVG inside a page: they take the page's colours and fonts, and say in words what they show."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wagle_pl.study.report.html import Content, Markup, element

#: Role -> the colour a figure is drawn in; the page gives each role a colour a mode (``--ink`` … in style.css).
COLOURS = {
    "ink": "#010203",
    "muted": "#040506",
    "line": "#070809",
    "paper": "#0a0b0c",
    "target": "#0d0e0f",
    "retrained": "#101112",
    "this": "#131415",
}

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_SMALLEST = 0.7  # of its size: what is smaller cannot be read; it scrolls instead
_PLACES = {"d", "x", "y"}
_LONG = re.compile(r"-?\d+\.\d{3,}(?!\d*e)")
_FONT = re.compile(r"font:\s*(?:(?:normal|bold|italic|\d{3})\s+)*([\d.]+px)[^;]*")


@contextmanager
def page_style() -> Iterator[None]:
    """Figures made inside are drawn in the page's colours."""
    from matplotlib import rc_context

    ink, paper = COLOURS["ink"], COLOURS["paper"]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    colours |= {
        "axes.edgecolor": COLOURS["muted"],
        "figure.facecolor": paper,
        "axes.facecolor": paper,
    }
    colours |= {
        "grid.color": COLOURS["line"],
        "savefig.facecolor": paper,
        "legend.facecolor": paper,
    }
    spines = {f"axes.spines.{side}": False for side in ("top", "right")}
    plain = {"text.parse_math": False}  # a dollar in a name is a dollar
    with rc_context(
        {**colours, **spines, "legend.frameon": False, "font.size": 9, "axes.grid": True, **plain}
    ):
        yield


def inline_svg(figure: Any, name: str, title: str, description: str) -> Markup:
    """A figure as an ``<svg>`` element with a text alternative.

    Args:
        figure: a ``matplotlib.figure.Figure`` made inside :func:`page_style`.
        name: prefix of the ids inside, different for each figure of a page.
        title: what it is.
        description: what it shows, in words and numbers.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "wagle_pl", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    width = float(root.get("width", "0").removesuffix("pt")) * 4 / 3
    _strip(root)
    _rename(root, name)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": f"max-width: {width:.0f}px; min-width: {_SMALLEST * width:.0f}px; stroke-linejoin: round",
    }
    for tag, text in (("desc", description), ("title", title)):
        told = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        told.text = text
        root.insert(0, told)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def figure_element(svg: Markup, caption: Content, heading: bool = False) -> Markup:
    """A figure with its caption below it, or above it as a heading."""
    told = element("figcaption", caption)
    return (
        element("figure", told, svg, class_="headed") if heading else element("figure", svg, told)
    )


def _strip(root: ElementTree.Element) -> None:
    """Take out what a page has no use for: metadata, style sheets, clip paths (nothing is drawn outside the axes)."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}defs" and child.find(f"{_SVG}style") is not None:
                child.remove(child.find(f"{_SVG}style"))
            if child.tag in (f"{_SVG}clipPath",) or child.tag.endswith("metadata"):
                parent.remove(child)
    for node in root.iter():
        node.attrib.pop("clip-path", None)
        node.tag = node.tag.removeprefix(_SVG)
        if _LINK in node.attrib:
            node.set("href", node.attrib.pop(_LINK))
        for key in _PLACES & node.attrib.keys():
            node.set(key, _LONG.sub(lambda found: f"{float(found[0]):.2f}", node.attrib[key]))
        if "style" in node.attrib:
            node.set("style", _page_colours(_FONT.sub(r"font-size: \1", node.attrib["style"])))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "defs" and len(child) == 0:
                parent.remove(child)


def _rename(root: ElementTree.Element, name: str) -> None:
    """Keep only ids that something refers to, and make them the figure's own."""
    used = {node.get("href", "")[1:] for node in root.iter()}
    for node in root.iter():
        if "href" in node.attrib:
            node.set("href", f"#{name}-{node.attrib['href'][1:]}")
        if (own := node.attrib.pop("id", None)) in used:
            node.set("id", f"{name}-{own}")


def _page_colours(style: str) -> str:
    for role, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{role})")
    return style
