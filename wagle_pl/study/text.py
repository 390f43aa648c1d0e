"""A study's findings for people: Markdown, console table, and how long there is to go."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from wagle_pl.core.text import decimals, table
from wagle_pl.study.report.reading import AT_END, about, marked_name, progress
from wagle_pl.study.report.study import by_objective, rates_of

Entry = Mapping[str, Any]

HEADER = (
    *(
        "mask",
        "utility",
        "seeds",
        "reach",
        "against dense",
        "difference",
        "p",
        "equal steps",
        "area",
        "dense's",
    ),
    *("lr", "steps", "MU", "UE", "UT"),
)


def chance(p: float) -> str:
    """A p-value with three decimals, never as zero.

    >>> chance(0.0123), chance(0.0002)
    ('0.012', '<0.001')
    """
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def signed(value: Optional[float]) -> str:
    """A difference with its sign; a dash for None.

    >>> signed(0.5), signed(-0.01)
    ('+0.500', '-0.010')
    """
    return "–" if value is None else f"{value:+.3f}"


def duration(seconds: float) -> str:
    """A time span, short.

    >>> duration(42), duration(150), duration(7500)
    ('42 s', '2.5 min', '2 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def time_left(measured: Sequence[float], runs: int) -> str:
    """How long the runs that are left will take, from those measured; empty without any."""
    return f"{duration(runs * sum(measured) / len(measured))} left" if measured and runs else ""


def cells(entry: Entry) -> list[str]:
    """One arm as a row under :data:`HEADER`."""
    spread = "" if entry["std"] is None else f" ± {entry['std']:.3f}"
    p = chance(entry["p"]) if entry["p"] is not None else entry["why"] or "–"
    at_end = [decimals(entry[name]) for name in AT_END]
    area, equal = entry["area"], entry["equal_steps"]
    return [
        marked_name(entry),
        "–" if entry["mean"] is None else f"{entry['mean']:.3f}{spread}",
        f"{entry['n']}/{entry['seeds']}",
        f"{entry['reached']:.0%}",
        entry["verdict"] or "–",
        signed(entry["difference"]),
        p,
        signed(equal["difference"] if equal else None)
        + (f" (p {chance(equal['p'])})" if equal and equal["p"] is not None else ""),
        decimals(area["mean"]),
        decimals(area["dense"]),
        rates_of(entry),
        decimals(entry["steps"], 0),
        *at_end,
    ]


def shown(arms: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table; columns that hold nothing are left out."""
    rows = [cells(arm) for arm in arms]
    kept = [i for i in range(len(HEADER)) if i < 5 or any(row[i] != "–" for row in rows)]
    return [HEADER[i] for i in kept], [[row[i] for i in kept] for row in rows]


def console(summary: Entry) -> str:
    """Tables for the console, with what wins, ties and loses."""
    parts = []
    for objective, arms in by_objective(summary).items():
        parts.append(f"{objective}\n{table(*shown(arms), left=(0, 4))}\n{outcome(arms)}")
    notes = [textwrap.fill(line, 110, subsequent_indent="  ") for line in about(summary)]
    return "\n\n".join([*parts, "\n".join(notes)])


def markdown(summary: Entry) -> str:
    """The whole of ``study.md``."""
    lines = ["# Study", "", progress(summary), ""]
    lines += [reference_table(summary), ""]
    for objective, arms in by_objective(summary).items():
        header, rows = shown(arms)
        lines += [f"## {objective}", "", "| " + " | ".join(header) + " |"]
        lines += [
            "| " + " | ".join("---" if i in (0, 4) else "---:" for i in range(len(header))) + " |"
        ]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        ]
        lines += ["", outcome(arms), ""]
    return "\n".join(
        [*lines, "## How to read it", "", *(f"- {line}" for line in about(summary)), ""]
    )


def reference_table(summary: Entry) -> str:
    """Target and retrained model by the two measures."""
    names = [summary["forget"], summary["utility"]]
    lines = ["| model | " + " | ".join(names) + " |", "| --- | ---: | ---: |"]
    for model in ("target", "retrained"):
        if summary[model]:
            lines.append(
                f"| {model} | "
                + " | ".join(decimals(summary[model].get(name)) for name in names)
                + " |"
            )
    return "\n".join(lines)


def outcome(arms: Sequence[Entry]) -> str:
    """In a sentence: what wins, ties and loses against dense, and what cannot be said.

    >>> outcome([{"mask": "wagle 0.2", "verdict": "wins"}, {"mask": "dense", "verdict": ""}])
    'Against dense: wins: wagle 0.2.'
    """
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm["verdict"]:
            groups.setdefault(arm["verdict"], []).append(arm["mask"])
    first = ["wins", "ties", "loses"]
    order = [word for word in first if word in groups] + [
        word for word in groups if word not in first
    ]
    if not order:
        return "There is nothing to compare with dense yet."
    return (
        "Against dense: " + "; ".join(f"{word}: {', '.join(groups[word])}" for word in order) + "."
    )
