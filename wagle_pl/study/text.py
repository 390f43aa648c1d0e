"""A study's findings for people: Markdown, console table, and how long there is to go."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from wagle_pl.core.text import count, decimals, table
from wagle_pl.study.summary import AT_END

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


def ranked(arms: Sequence[Mapping[str, Any]], sign: int) -> list[Mapping[str, Any]]:
    """The best utility at equal forgetting first, arms that never get there last.

    Args:
        arms: of a study's headline.
        sign: 1 if more utility is better, −1 if less.
    """

    def place(arm: Mapping[str, Any]) -> tuple[bool, float, float]:
        """Where an arm comes."""
        mean = arm.get("mean")
        return mean is None, -sign * (mean or 0.0), -arm.get("reached", 0.0)

    return sorted(arms, key=place)


def by_objective(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Objective -> its arms, ranked."""
    arms, sign = summary["headline"], summary.get("utility_sign", 1)
    names = dict.fromkeys(arm["objective"] for arm in arms)
    return {name: ranked([arm for arm in arms if arm["objective"] == name], sign) for name in names}


def rates_of(arm: Mapping[str, Any]) -> str:
    """The learning rates that were best for some seed."""
    return " ".join(f"{rate:g}" for rate in sorted(set((arm.get("learning_rates") or {}).values())))


#: Behind the name of a mask that has learning rates of its own.
MARK = "*"


def marked_name(arm: Mapping[str, Any]) -> str:
    """Name of an arm's mask, marked if it was tried with learning rates of its own.

    >>> marked_name({"mask": "lora", "own_learning_rates": True}), marked_name({"mask": "dense"})
    ('lora*', 'dense')
    """
    return str(arm.get("mask")) + (MARK if arm.get("own_learning_rates") else "")


def progress(summary: Mapping[str, Any]) -> str:
    """How many runs there are of those planned; empty if the study does not say.

    >>> progress({"runs": {"finished": 100, "planned": 942}})
    '100 of 942 runs are finished.'
    """
    runs = summary.get("runs")
    return f"{runs['finished']} of {runs['planned']} runs are finished." if runs else ""


def about(summary: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what to hold against the comparison, in whole sentences.

    Args:
        summary: content of ``study.json``.
    """
    level = decimals(summary.get("forget_level"))
    whose = (
        "the retrained model's" if summary.get("level_of") == "retrained" else "the level asked for"
    )
    lines = [
        f"utility: {summary['utility']} where {summary['forget']} reaches {level}, {whose}; best learning rate of each "
        "seed, mean ± standard deviation over seeds. Read from the curve through the run's test points, piecewise "
        "linear, points at which the run has not forgotten more than before left out.",
        "seeds: seeds that reach that level with some learning rate, of those finished. reach: share of all runs that "
        "do. What never does has no utility at equal forgetting: nothing is extrapolated.",
        "against dense: a tie is a difference within the larger of the two standard deviations, or of p 0.05 and more. "
        "p: paired t-test over seeds. difference: over the seeds of both.",
        "steps: to that level; slower runs tend to keep more, whatever the mask. equal steps: difference from dense "
        "and p, where runs of both get there in as many steps, piecewise linear over learning rates; a run that took "
        "no fewer steps than one with a slower rate is left out.",
        "area: mean utility over forgetting, from the target to the level or to where arm or dense ends first; dense's "
        "over the same range.",
    ]
    arms = summary["headline"]
    if summary.get("nothing_to_unlearn"):
        lines.insert(
            0, "The target is at that level already, or past it: there is nothing to unlearn."
        )
    if any(arm.get(name) is not None for arm in arms for name in AT_END):
        lines.append(
            "MU: TOFU's model utility. UE, UT: averages of WAGLE's tables. Of the chosen runs at their ends: "
            f"{_where(summary)}."
        )
    if any(arm.get("own_learning_rates") for arm in arms):
        lines.append(f"{MARK}: tried with learning rates of its own.")
    runs = summary.get("runs") or {"finished": 0, "planned": 0}
    uneven = len({arm.get("runs") for arm in arms if arm.get("seeds")}) > 1
    if (
        uneven and runs["finished"] < runs["planned"]
    ):  # finished, they differ by learning rates of their own
        lines.append(
            "Arms have different numbers of finished runs so far: wait for the rest before comparing."
        )
    diverged = sum(arm.get("diverged", 0) for arm in arms)
    if diverged:
        what = count(diverged, "run")
        lines.append(f"{what} diverged (loss NaN or infinite); what was tested before that counts.")
    return lines


def _where(summary: Mapping[str, Any]) -> str:
    """Where the ends of runs are, beside the level at which arms are compared."""
    ends = (summary.get("settings") or {}).get("ends_at") or {}
    if summary["forget"] in ends and ends[summary["forget"]] == summary.get("forget_level"):
        return "just past the level, as runs end there"
    return "not at equal forgetting"
