"""Numbers, fields and tables as plain text, for the console and for Markdown files."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Optional

Rows = Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Rows, left: Collection[int] = (0,)) -> str:
    """A table with aligned columns; those of ``left`` to the left, the others to the right.

    >>> print(table(["layer", "share"], [["0", "5.0%"], ["10", "12.5%"]]))
    layer  share
    0       5.0%
    10     12.5%
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<" if i in left else ">" for i in range(len(header))]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(line.format(*row).rstrip() for row in (header, *rows))


def fields(values: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair per line, the values aligned."""
    width = max(len(name) for name, _ in values)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in values)


def markdown_table(header: Sequence[str], rows: Rows, left: Collection[int] = (0,)) -> str:
    r"""A table in Markdown; columns of ``left`` are aligned to the left, the others to the right.

    >>> print(markdown_table(["arm", "p"], [["a|b", "0.1"]]))
    | arm | p |
    | --- | ---: |
    | a\|b | 0.1 |
    """
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    first, *others = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (first, rule, *others))


def short_number(value: float) -> str:
    """A number with three significant digits; integers and numbers of 1000 and more as a whole.

    >>> [short_number(value) for value in (0.92, 2.72e-11, 12345.6, 40, 0.0, float("inf"))]
    ['0.920', '2.72e-11', '12,346', '40', '0.00', 'inf']
    """
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 999.5):
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def count(number: int, one: str, many: Optional[str] = None) -> str:
    """A number of things; the plural is ``many``, or ``one`` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def percent(share: float) -> str:
    """A share in percent, short; only exactly 0 and 1 are shown as 0 and 100.

    >>> [percent(share) for share in (0, 0.0001, 0.0314, 0.5, 0.9999, 1)]
    ['0', '<0.1', '3.1', '50', '>99', '100']
    """
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}"
    if value < 0.1:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}" if value < 99.5 else ">99"
