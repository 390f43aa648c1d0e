"""HTML of plain values: every text is escaped, every number carries its full precision."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

VOID = frozenset({"meta", "br", "hr", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = Union[str, Markup, None, Iterable["Content"]]


def markup(content: Content) -> Markup:
    """Content as HTML: text is escaped, None is nothing, parts follow each other.

    >>> markup(["a < b", None, Markup("<br>")])
    'a &lt; b<br>'
    """
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(html.escape(content, quote=False))
    return Markup("".join(markup(part) for part in content))


def element(tag: str, /, *content: Content, **attributes: Any) -> Markup:
    """An element.

    Args:
        tag: its name.
        content: inside it.
        attributes: ``class_`` is ``class`` and ``data_run`` is ``data-run``; None leaves one out, True has no value.

    >>> element("p", "1 < 2", class_="note", hidden=True, id=None)
    '<p class="note" hidden>1 &lt; 2</p>'
    """
    texts = [tag]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            texts.append(key)
        elif value is not None:
            texts.append(f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(texts)}>"
    return Markup(start) if tag in VOID else Markup(f"{start}{markup(content)}</{tag}>")


def shown(value: float) -> str:
    """A number as people read it: three digits, or whole when it is large.

    >>> [shown(value) for value in (0.92, 2.72e-11, 12345.6, 40, 0.0, float("inf"))]
    ['0.920', '2.72e-11', '12,346', '40', '0.00', 'inf']
    """
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 999.5):
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def number(value: Optional[float], text: Optional[str] = None, **attributes: Any) -> Markup:
    """A number: what people read, and in ``value`` all its digits; an en dash for None.

    Args:
        value: the number.
        text: what people read; :func:`shown` when None.
        attributes: e.g. ``data_run`` and ``data_measure``: where it comes from.

    >>> number(1 / 3)
    '<data value="0.3333333333333333">0.333</data>'
    """
    if value is None:
        return element("span", "–", title="not measured")
    return element("data", shown(value) if text is None else text, value=repr(value), **attributes)


def table(
    header: Sequence[Content],
    rows: Sequence[Sequence[Content]],
    caption: Content = None,
    kind: str = "",
) -> Markup:
    """A table that scrolls sideways when it is wider than the page; the first cell of a row is its header.

    Args:
        header: of the columns.
        rows: cells.
        caption: above it.
        kind: class of the table.
    """
    head = element("tr", [element("th", cell, scope="col") for cell in header])
    body = [
        element("tr", element("th", first, scope="row"), [element("td", cell) for cell in rest])
        for first, *rest in rows
    ]
    inner = [
        element("caption", caption) if caption else None,
        element("thead", head),
        element("tbody", body),
    ]
    label = "table, scrolls sideways"
    return element(
        "div",
        element("table", inner, class_=kind),
        class_="wide",
        tabindex=0,
        role="region",
        aria_label=label,
    )


def facts(pairs: Sequence[tuple[str, Content]]) -> Markup:
    """Names and values, one pair a line; pairs without a value are left out."""
    kept = [(name, value) for name, value in pairs if value not in (None, "")]
    return element(
        "dl", [element("div", element("dt", name), element("dd", value)) for name, value in kept]
    )


def note(*content: Content) -> Markup:
    """A remark, such as what is missing."""
    return element("p", *content, class_="note")
