"""A study's findings for people: ``study.md``, the console's tables, the time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Optional

from wagle_pl.core.text import count, markdown_table
from wagle_pl.lab.study import recovery
from wagle_pl.lab.study.summary import AT_END, UNRESOLVED, decimals, mean_std

Arm = Mapping[str, Any]  # one of a summary's ``headline``
Summary = Mapping[str, Any]  # content of ``study.json``


class Block(NamedTuple):
    """A piece of a document: a ``heading``, a ``text``, a ``list`` of lines, or a ``table``."""

    kind: Literal["heading", "text", "list", "table"]
    text: str = ""  # or the title of a table
    lines: Sequence[str] = ()
    table: Sequence[Any] = ()  # header and rows


_LEFT = (0, 4)  # columns of words: mask, verdict
_ALWAYS = 5  # columns shown even if they are empty
MARK = "*"  # after the name of a mask that has its own learning rates


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


def by_objective(summary: Summary) -> dict[str, list[Arm]]:
    """Objective -> its arms: the best utility at equal forgetting first, arms without it last."""
    sign = summary.get("utility_sign") or 1

    def place(arm: Arm) -> tuple[bool, float, float]:
        mean = arm.get("mean")
        return mean is None, -sign * (mean or 0.0), -arm.get("reached", 0.0)

    arms_of: dict[str, list[Arm]] = {arm["objective"]: [] for arm in summary["headline"]}
    for arm in sorted(summary["headline"], key=place):
        arms_of[arm["objective"]].append(arm)
    return arms_of


def rates_of(arm: Arm) -> str:
    """The learning rates that were best for some seed."""
    return " ".join(f"{rate:g}" for rate in sorted(set((arm.get("learning_rates") or {}).values())))


def cells(arm: Arm) -> dict[str, str]:
    """One arm as a row of the table: name of the column -> cell."""
    area, equal = arm["area"], arm["equal_steps"] or {"difference": None, "p": None}
    equal_p = "" if equal["p"] is None else f" (p {chance(equal['p'])})"
    return {
        "mask": arm["mask"] + (MARK if arm.get("own_learning_rates") else ""),
        "utility": mean_std(arm["mean"], arm["std"]),
        "seeds": f"{arm['n']}/{arm['seeds']}",
        "reach": f"{arm['reached']:.0%}",
        "against dense": arm["verdict"] or "–",
        "difference": signed(arm["difference"]),
        "p": chance(arm["p"]) if arm["p"] is not None else arm["why"] or "–",
        "equal steps": signed(equal["difference"]) + equal_p,
        "area": decimals(area["mean"]),
        "dense's": decimals(area["dense"]),
        "lr": rates_of(arm),
        "steps": decimals(arm["steps"], 0),
        **{name: decimals(arm[key]) for name, key in zip(("MU", "UE", "UT"), AT_END, strict=True)},
    }


def shown(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table; columns that hold nothing are left out."""
    rows = [cells(arm) for arm in arms]
    names = enumerate(rows[0])
    header = [name for i, name in names if i < _ALWAYS or any(row[name] != "–" for row in rows)]
    return header, [[row[name] for name in header] for row in rows]


def outcome(arms: Sequence[Arm]) -> str:
    """In a sentence: what wins and loses against dense, and what cannot be said.

    >>> outcome([{"mask": "wagle 0.2", "verdict": "wins"}, {"mask": "dense", "verdict": ""}])
    'Against dense: wins: wagle 0.2.'
    """
    words = dict.fromkeys(["wins", UNRESOLVED, "loses", *(arm["verdict"] for arm in arms)])
    groups = {word: [arm["mask"] for arm in arms if arm["verdict"] == word] for word in words}
    phrases = [f"{word}: {', '.join(masks)}" for word, masks in groups.items() if word and masks]
    nothing = "There is nothing to compare with dense yet."
    return f"Against dense: {'; '.join(phrases)}." if phrases else nothing


def document(summary: Summary) -> Iterator[Block]:
    """The comparison, for ``study.md`` and for the page: tables of arms, and how to read them."""
    for objective, arms in by_objective(summary).items():
        yield Block("heading", objective)
        yield Block("table", table=shown(arms))
        yield Block("text", outcome(arms))
    yield Block("heading", "How to read it")
    yield Block("list", lines=about(summary))
    if ends := summary.get("ends"):
        yield Block("heading", "Kept, and brought back")
        for title, *content in recovery.tables(ends):
            yield Block("table", title, table=content)
        yield Block("list", lines=recovery.about(ends))


def markdown(summary: Summary) -> str:
    """Content of ``study.md``."""
    names = [summary["forget"], summary["utility"]]
    models = [
        [model, *(decimals(summary[model].get(name)) for name in names)]
        for model in ("target", "retrained")
        if summary[model]
    ]
    parts = ["# Study", progress(summary), markdown_table(["model", *names], models)]
    for kind, text, lines, content in document(summary):
        if kind == "list":
            parts.append("\n".join(f"- {line}" for line in lines))
        elif kind == "table":
            parts += [f"### {text}"] if text else []
            header, rows = content
            parts.append(markdown_table(header, rows, (0,) if text else _LEFT))
        else:
            parts.append(f"## {text}" if kind == "heading" else text)
    return "\n\n".join(parts) + "\n"


def progress(summary: Summary) -> str:
    """How many runs there are of those planned; empty if the study does not say."""
    runs = summary.get("runs")
    return f"{runs['finished']} of {runs['planned']} runs are finished." if runs else ""


def about(summary: Summary) -> list[str]:
    """What the columns mean, and the limits of the comparison."""
    arms, forget, level = summary["headline"], summary["forget"], summary.get("forget_level")
    retrained = summary.get("level_of") == "retrained"
    whose = "the retrained model's" if retrained else "the level asked for"
    lines = [
        f"utility: {summary['utility']} where {forget} reaches {decimals(level)}, {whose}, with "
        "the best learning rate of each seed; mean ± standard deviation over seeds. Read from the "
        "curve through the run's test points by linear interpolation; points at which the run has "
        "not forgotten more than before are left out.",
        "seeds: seeds that reach that level with some learning rate, of those finished. reach: "
        "share of all runs that do. An arm that never does has no utility at equal forgetting: "
        "nothing is extrapolated.",
        "against dense: a difference is not resolved if it is within the larger of the two standard "
        "deviations, or if p ≥ 0.05; that proves no equality. p: paired t-test over seeds. "
        "difference: over the seeds of both.",
        "steps: to that level; slower runs tend to keep more, whatever the mask. equal steps: "
        "difference from dense, and its p, where runs of both get there in equally many steps, "
        "interpolated over learning rates; a run that took no fewer steps than one with a slower "
        "rate is left out.",
        "area: mean utility over forgetting, from the target to the level or to where arm or dense "
        "ends first; dense's over the same range.",
    ]
    if summary.get("nothing_to_unlearn"):
        lines.insert(0, "The target is at that level already: there is nothing to unlearn.")
    if any(arm.get(name) is not None for arm in arms for name in AT_END):
        ends = (summary.get("settings") or {}).get("ends_at") or {}
        at_level = forget in ends and ends[forget] == level
        where = "just past the level, where runs end" if at_level else "not at equal forgetting"
        lines.append(
            "MU: TOFU's model utility. UE, UT: averages of WAGLE's tables (unlearning efficacy, "
            f"utility). All three are measured at the ends of an arm's best runs: {where}."
        )
    if any(arm.get("own_learning_rates") for arm in arms):
        lines.append(f"{MARK}: tried with its own learning rates.")
    runs = summary.get("runs") or {"finished": 0, "planned": 0}
    uneven = len({arm.get("runs") for arm in arms if arm.get("seeds")}) > 1
    if uneven and runs["finished"] < runs["planned"]:  # not by learning rates of their own
        lines.append("Arms have different numbers of finished runs so far: wait for the rest.")
    if diverged := sum(arm.get("diverged") or 0 for arm in arms):
        what = count(diverged, "run")
        lines.append(f"{what} diverged (loss NaN or infinite); what was tested before that counts.")
    return lines
