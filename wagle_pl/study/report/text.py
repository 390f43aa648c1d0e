"""Plain-text tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns under a header, flush right but for those of ``left``.

    >>> print(table(["layer", "share"], [["0", "5.0%"], ["10", "12.5%"]]))
    layer  share
    0       5.0%
    10     12.5%
    """
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def cells(line: Sequence[str]) -> Iterator[str]:
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            yield cell.ljust(width) if i in left else cell.rjust(width)

    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)


def fields(values: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line.

    >>> print(fields([("model", "tiny"), ("density", "5%")]))
    model    tiny
    density  5%
    """
    width = max(len(name) for name, _ in values)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in values)


def decimals(value: Optional[float], digits: int = 3) -> str:
    """A number with ``digits`` decimals; a dash for None.

    >>> decimals(0.12345), decimals(None)
    ('0.123', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def count(number: int, what: str) -> str:
    """A number of things.

    >>> count(1, "run"), count(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def percent(share: float) -> str:
    """A share in percent, short, never rounded to nothing or to everything.

    >>> [percent(share) for share in (0, 0.0001, 0.0314, 0.5, 0.9999, 1)]
    ['0', '<0.1', '3.1', '50', '>99', '100']
    """
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}"
    if value < 0.1:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}" if value < 99.5 else ">99"
