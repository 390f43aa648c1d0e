"""Pages in HTML that have no scripts and load nothing, whatever a text in them says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wagle_pl.core.text import short_number

_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1>
{links}</header>
<main>
{content}
</main>
</body>
</html>
""")


def page(title: str, content: Iterable[Markup], links: Iterable[Markup] = ()) -> str:
    """A whole page."""
    style = Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    body = Markup("\n").join(content)
    return str(_PAGE.format(title=title, style=style, links=Markup("\n").join(links), content=body))


def element(tag: str, *content: str, **attributes: Any) -> Markup:
    """An element; text that is no :class:`Markup` is escaped, and an attribute of None left out.

    >>> element("td", "a < b", class_="note", title=None)
    Markup('<td class="note">a &lt; b</td>')
    """
    written = Markup().join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), value)
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("img",):
        return Markup("<{}{}>").format(tag, written)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, written, Markup().join(content))


def note(text: str) -> Markup:
    """A remark."""
    return element("p", text, class_="note")


def number(value: Any, text: str = "", **origin: str) -> Markup:
    """A number, short or as ``text``; its element has all digits, and where they are from."""
    if value is None:
        return element("span", "–", title="not measured")
    return element("data", text or short_number(value), value=repr(value), **origin)


def cell(content: Any) -> str:
    """Text as it is; a number as a number."""
    return content if isinstance(content, str) else number(content)


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "numbers", caption: str = ""
) -> Markup:
    """A table that scrolls sideways when it is wider than the page.

    Args:
        rows: the first cell of each is its heading; see :func:`cell`.
        kind: CSS classes.
    """
    head = element("tr", *(element("th", name, scope="col") for name in header))
    lines = [
        element(
            "tr", element("th", cell(first), scope="row"), *(element("td", cell(c)) for c in rest)
        )
        for first, *rest in rows
    ]
    above = element("caption", caption) if caption else ""
    body = element("tbody", *lines)
    rendered = element("table", above, element("thead", head), body, class_=kind)
    label = "table, scrolls sideways"
    return element("div", rendered, class_="wide", tabindex=0, role="region", aria_label=label)


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """A list of names and values; an empty value is left out."""
    shown = ((name, cell(value)) for name, value in pairs if value not in (None, ""))
    return element("dl", *(element("div", element("dt", n), element("dd", v)) for n, v in shown))


def exchange(question: str, answers: Iterable[tuple[str, str, str]]) -> Markup:
    """A question and what was answered: (whose answer, the text, a CSS class) side by side."""
    boxes = (
        element("div", element("dt", label), element("dd", text, dir="auto"), class_=kind or None)
        for label, text, kind in answers
    )
    heading = element("h4", question, dir="auto")
    return element("article", heading, element("dl", *boxes), class_="exchange")
