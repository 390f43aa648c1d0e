"""Matplotlib figures as elements of a page: in its colours, and with a text alternative."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

#: Colours that figures are drawn in. In a page each is replaced by the variable of that name in
#: ``style.css``, which has a light and a dark value; nothing else may be drawn in these colours.
PALETTE = {
    "ink": "#1b2430",
    "muted": "#5d6b7c",
    "line": "#dde3ea",
    "paper": "#fefefe",
    "target": "#a34a00",
    "retrained": "#00725c",
    "this": "#1a5fb4",
}

#: matplotlib's settings for the figures of a page.
STYLE: dict[str, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), PALETTE["ink"]
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PALETTE["paper"]),
    "axes.edgecolor": PALETTE["muted"],
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": PALETTE["line"],
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a name is a dollar
}

#: matplotlib's settings for SVG files: text stays text, and the same figure makes the same bytes.
SVG = {"svg.hashsalt": "wagle_pl", "svg.fonttype": "none"}

_VARIABLES = {colour: f"var(--{role})" for role, colour in PALETTE.items()}
_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_SMALLEST = 0.7  # of its size: a narrower page scrolls the figure, as smaller text is not readable


def svg(
    name: str, title: str, description: str, draw: Callable[..., Any], *arguments: Any
) -> Markup:
    """A figure as an ``<svg>`` element.

    Args:
        name: prefix of the ids inside, another for each figure of a page.
        title: what the figure is.
        description: what it shows, in words and numbers.
        draw: makes the ``matplotlib.figure.Figure`` out of ``arguments``; called with the settings
            of a page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE | SVG):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw(*arguments).savefig(buffer, format="svg", metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    links = dict.fromkeys(node.attrib[_LINK][1:] for node in root.iter() if _LINK in node.attrib)
    ids = {link: f"{name}-{i}" for i, link in enumerate(links)}
    for node in root.iter():
        _simplify(node, ids)
    width = float(root.get("width", "0").removesuffix("pt")) * 4 / 3
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": f"max-width: {width:.0f}px; min-width: {_SMALLEST * width:.0f}px",
    }
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _simplify(node: ElementTree.Element, ids: dict[str, str]) -> None:
    """Remove what a page has no use for; use the page's colours, and ``ids`` where needed."""
    for child in list(node):
        if child.tag in (f"{_NAMESPACE}style", f"{_NAMESPACE}clipPath"):
            node.remove(child)  # nothing is drawn outside of the axes
    styles = {child.get("style") if child.tag == f"{_NAMESPACE}use" else None for child in node}
    if len(styles) == 1 and None not in styles:  # the markers of a line: one style for all
        node.set("style", styles.pop())
        for child in node:
            del child.attrib["style"]
    node.tag, node.tail = node.tag.removeprefix(_NAMESPACE), None
    if node.text and node.text.isspace():
        node.text = None
    node.attrib.pop("clip-path", None)
    if node.get("transform", "").startswith("rotate(-0 "):
        del node.attrib["transform"]
    if _LINK in node.attrib:
        node.set("href", f"#{ids[node.attrib.pop(_LINK)[1:]]}")
    if (own := node.attrib.pop("id", None)) in ids:
        node.set("id", ids[own])
    for key in {"d", "x", "y"} & node.attrib.keys():
        short = re.sub(r"-?\d+\.\d{3,}", _rounded, node.attrib[key])
        node.set(key, re.sub(r"\s+", " ", short).strip())
    if "style" in node.attrib:
        style = re.sub(r"; font-family: [^;]*", "", node.attrib["style"])  # the page's own
        node.set("style", re.sub("#[0-9a-f]{6}", lambda c: _VARIABLES.get(c[0], c[0]), style))


def _rounded(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 2):g}"
