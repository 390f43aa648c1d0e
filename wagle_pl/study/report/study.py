"""Section about a study: utility at equal forgetting, and the forget–utility curve of every arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.masks import WeightMask
from wagle_pl.study.report import curves
from wagle_pl.study.report.html import Content, Markup, element, facts, note, number, shown, table
from wagle_pl.study.report.sections import largest_share, mask_figure
from wagle_pl.study.report.sources import Study
from wagle_pl.study.report.svg import figure_element, inline_svg, page_style
from wagle_pl.study.text import about, by_objective, marked_name, progress, ranked, rates_of

MASKS = "masks"  # folder of a study
HEADLINE = "headline"  # of study.json: utility at equal forgetting
#: Called as in ``study.md``: what they mean stands in the same words below both.
_COLUMNS = (
    *(
        "mask",
        "utility",
        "seeds",
        "reach",
        "against dense",
        "difference",
        "p",
        "equal steps",
        "equal steps: p",
    ),
    *("area", "area: difference", "area: p", "lr", "steps", "MU", "UE", "UT"),
)
REFERENCES = ("target", "retrained")
DENSE = "dense"  # the mask that selects everything: what the others are compared with
#: Column of the table -> what the report calls its values.
_SETTINGS = {
    "objective": "objectives",
    "mask": "masks",
    "density": "densities",
    "lr": "learning rates",
    "seed": "seeds",
}
_SHOWN = (*_SETTINGS, "step", "forget", "utility", "seconds", "note")

_READING = (
    "One line a run, from the target model through its test points; all panels of an objective have the same axes. The "
    "dotted line is where utilities are compared: the retrained model's forgetting, unless another level was chosen."
)

Row = Mapping[str, Any]


class Arm(NamedTuple):
    """What a study compares: an objective within a mask."""

    objective: str
    mask: str


def study_section(study: Study, index: int) -> Content:
    """Everything about one study."""
    runs = runs_of(study.rows)
    return [
        _about(study, runs),
        element("h3", "Headline"),
        _headline(study),
        _overview(study, index),
        element("h3", "Forgetting against utility"),
        _curves(study, index),
        element("h3", "Masks"),
        _masks(study, index),
        element(
            "details",
            element("summary", "Every run at its last test point"),
            _last_points(study, runs),
        ),
        [note(f"{study.name}: {said}.") for said in study.notes],
    ]


def runs_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Run -> its test points in the order of its steps."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(str(row.get("run")), []).append(row)
    return {
        run: sorted(points, key=lambda row: row.get("step") or 0) for run, points in runs.items()
    }


def arms_of(rows: Iterable[Row]) -> dict[Arm, dict[str, list[Row]]]:
    """Arm -> its runs. Masks of one name and several densities are told apart by the density."""
    rows = list(rows)
    densities: dict[str, set[Any]] = {}
    for row in rows:
        densities.setdefault(str(row.get("mask")), set()).add(row.get("density"))

    def arm(row: Row) -> Arm:
        mask = str(row.get("mask"))
        return Arm(
            str(row.get("objective")),
            f"{mask}, {row['density']:g}" if len(densities[mask]) > 1 else mask,
        )

    groups: dict[Arm, list[Row]] = {}
    for row in rows:
        groups.setdefault(arm(row), []).append(row)
    return {each: runs_of(found) for each, found in groups.items()}


def _about(study: Study, runs: Mapping[str, Sequence[Row]]) -> Content:
    def values(column: str) -> str:
        found = dict.fromkeys(row[column] for row in study.rows if row.get(column) is not None)
        if all(isinstance(value, (int, float)) for value in found):
            return ", ".join(f"{value:g}" for value in sorted(found))
        return ", ".join(map(str, found))

    pairs: list[tuple[str, Content]] = [("folder", element("code", str(study.folder)))]
    pairs += [(many, values(name)) for name, many in _SETTINGS.items()]
    pairs += [("runs", number(len(runs))), ("test points", number(len(study.rows)))]
    pairs += [("forget measure", study.forget), ("utility measure", study.utility)]
    rows = []
    for name in REFERENCES:
        found = study.reference(name)
        if found:
            cells = [
                number(found.get(c), data_run=f"{study.name}:{name}", data_measure=c)
                for c in ("forget", "utility")
            ]
            rows.append([element("span", name, class_=f"role {name}"), *cells])
    missing = [name for name in REFERENCES if not study.reference(name)]
    return [
        facts(pairs),
        table(["model", study.forget, study.utility], rows, kind="numbers") if rows else None,
        note(f"The study holds no numbers of the {' and the '.join(missing)} model.")
        if missing
        else None,
    ]


def _headline(study: Study) -> Content:
    """The study's own comparison: a row an arm."""
    finished = progress(study.summary)
    parts: list[Content] = [note(finished)] if finished else []
    if not study.summary.get(HEADLINE):
        return [*parts, note("The study has not compared its arms at equal forgetting yet.")]
    for objective, arms in by_objective(study.summary).items():
        rows = [[marked_name(arm), *_compared(arm)] for arm in arms]
        shown = [i for i in range(1, len(_COLUMNS)) if any(row[i] is not None for row in rows)]
        header = [_COLUMNS[0], *(_COLUMNS[i] for i in shown)]
        cells = [
            [row[0], *(number(None) if row[i] is None else row[i] for i in shown)] for row in rows
        ]
        parts += [element("h4", objective), table(header, cells, kind="numbers mixed")]
    level = study.summary.get("forget_level")
    told = [" where ", study.forget, " is ", number(level)] if level is not None else None
    return [
        *parts,
        note(
            f"Equal forgetting: {study.utility}",
            told,
            ". Differences are from dense of the same objective.",
        ),
        element("ul", *(element("li", line) for line in about(study.summary)), class_="note"),
    ]


def overview(summary: Mapping[str, Any]) -> Optional[Any]:
    """The mean curve of each arm as a figure, from what a study found; None if it has no curve yet.

    The best at equal forgetting come first, so that they have the plainest lines.
    """
    found = [arm for arm in summary.get(HEADLINE) or [] if arm.get("curve")]
    arms: dict[str, dict[str, Any]] = {arm["objective"]: {} for arm in found}
    for arm in ranked(found, summary.get("utility_sign", 1)):
        arms[arm["objective"]][arm["mask"]] = arm["curve"]
    if not arms:
        return None
    names = (summary["forget"], summary["utility"])
    points = {role: tuple(summary.get(role, {}).get(name) for name in names) for role in REFERENCES}
    references = {role: point for role, point in points.items() if None not in point}
    return curves.study_overview(arms, DENSE, references, summary.get("forget_level"), names)


def _overview(study: Study, index: int) -> Content:
    with page_style():
        figure = overview(study.summary)
        if figure is None:
            return None
        told = [
            f"{arm['objective']}, {arm['mask']}: from ({shown(arm['curve'][0][0])}, {shown(arm['curve'][0][1])}) to "
            f"({shown(arm['curve'][-1][0])}, {shown(arm['curve'][-1][1])})"
            for arm in study.summary[HEADLINE]
            if arm.get("curve")
        ]
        svg = inline_svg(
            figure, f"study-{index}-overview", "Mean curve of each arm", ". ".join(told)
        )
    return figure_element(
        svg, "Each arm with the best learning rate of each seed, utility averaged over seeds."
    )


def _compared(arm: Mapping[str, Any]) -> list[Content]:
    """Cells of an arm of the headline, as :data:`_COLUMNS` has them; None where there is no number."""
    area, equal, reached = arm.get("area") or {}, arm.get("equal_steps") or {}, arm.get("reached")
    return [
        _spread(arm),
        None if arm.get("seeds") is None else f"{arm.get('n')}/{arm['seeds']}",
        None if reached is None else [number(reached, f"{reached:.0%}"), f" of {arm.get('runs')}"],
        str(arm["verdict"]) if arm.get("verdict") else None,
        _number(arm.get("difference")),
        _number(arm.get("p")) or (str(arm["why"]) if arm.get("why") else None),
        _number(equal.get("difference")),
        _number(equal.get("p")),
        _spread(area),
        _number(area.get("difference")),
        _number(area.get("p")),
        rates_of(arm) or None,
        _number(arm.get("steps")),
        _number(arm.get("model_utility")),
        _number(arm.get("ue_average")),
        _number(arm.get("ut_average")),
    ]


def _number(value: Optional[float]) -> Content:
    return None if value is None else number(value)


def _spread(found: Mapping[str, Any]) -> Content:
    """Mean ± standard deviation, and of how many seeds."""
    if found.get("mean") is None:
        return None
    deviation = [" ± ", number(found["std"])] if found.get("std") is not None else None
    return [
        number(found["mean"]),
        deviation,
        element("small", f"{found.get('n')} seed{'' if found.get('n') == 1 else 's'}"),
    ]


def _cell(value: Any) -> Content:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# -- curves -----------------------------------------------------------------------------------------------------------


def _curves(study: Study, index: int) -> Content:
    arms = arms_of(study.rows)
    references = {
        name: (found["forget"], found["utility"])
        for name in REFERENCES
        if {"forget", "utility"} <= set(found := study.reference(name))
    }
    level = study.summary.get("forget_level", references.get("retrained", (None,))[0])
    names = (study.forget, study.utility)
    rates = sorted({row["lr"] for row in study.rows if row.get("lr") is not None})
    parts: list[Content] = []
    for objective in dict.fromkeys(arm.objective for arm in arms):
        of_arm = {
            arm.mask: _lines(runs, rates)
            for arm, runs in arms.items()
            if arm.objective == objective
        }
        of_arm = {mask: lines for mask, lines in of_arm.items() if lines}
        everything = [point for lines in of_arm.values() for line in lines for point in line.points]
        if not everything:
            parts.append(note(f"{objective}: no run has both measures yet."))
            continue
        bounds = curves.bounds_of([*everything, *references.values()])
        panels = []
        for mask, lines in of_arm.items():
            others, label = _background(of_arm, mask)
            name = f"study-{index}-{len(parts)}-{len(panels)}"
            with page_style():
                figure = curves.study_panel(lines, others, references, level, bounds, names, label)
                svg = inline_svg(
                    figure, name, f"Forgetting against utility, {objective}, {mask}", _told(lines)
                )
            panels.append(figure_element(svg, mask, heading=True))
        parts += [element("h4", objective), element("div", *panels, class_="grid")]
    return [*parts, note(_READING)]


def _lines(runs: Mapping[str, Sequence[Row]], rates: Sequence[float]) -> list[curves.Line]:
    """A line a run, marked by its learning rate; without points that lack a number."""
    lines = []
    for points in runs.values():
        pairs = [(row.get("forget"), row.get("utility")) for row in points]
        kept = [
            pair
            for pair in pairs
            if all(value is not None and math.isfinite(value) for value in pair)
        ]
        rate = points[0].get("lr")
        if kept and rate is None:
            lines.append(curves.Line(kept, "runs"))
        elif kept:
            lines.append(curves.Line(kept, f"lr {rate:g}", rates.index(rate)))
    return sorted(lines, key=lambda line: line.group)


def _background(
    of_arm: Mapping[str, Sequence[curves.Line]], mask: str
) -> tuple[list[curves.Points], str]:
    """Dense curves behind the others; behind the dense ones all others."""
    behind = (
        [DENSE]
        if DENSE in of_arm and mask != DENSE
        else [other for other in of_arm if other != mask]
    )
    return [line.points for other in behind for line in of_arm[other]], DENSE if behind == [
        DENSE
    ] else "the others"


def _told(lines: Sequence[curves.Line]) -> str:
    return ". ".join(
        f"{line.label}: " + ", ".join(f"({shown(x)}, {shown(y)})" for x, y in line.points)
        for line in lines
    )


# -- the rest ---------------------------------------------------------------------------------------------------------


def _masks(study: Study, index: int) -> Content:
    files = sorted((study.folder / MASKS).glob("*.safetensors"))
    if not files:
        return note(f"The study keeps no masks in {study.folder / MASKS}.")
    found, unread = {}, []
    for file in files:
        try:
            mask = WeightMask.load(file)
            found[file.stem] = (mask, mask.grid())
        except WagleError as error:
            unread.append(note(f"{error}."))
    largest = largest_share(grid for _, grid in found.values())
    parts = []
    for i, (name, (mask, grid)) in enumerate(found.items()):
        caption = [
            name,
            ": ",
            number(mask.density, f"{mask.density:.2%}"),
            f" selected by {mask.origin}",
        ]
        parts.append(mask_figure(f"study-{index}-mask-{i}", name, grid, caption, largest))
    return [element("div", *parts, class_="grid"), *unread]


def _last_points(study: Study, runs: Mapping[str, Sequence[Row]]) -> Markup:
    columns = [name for name in _SHOWN if any(row.get(name) is not None for row in study.rows)]
    rows = [
        [run, *(_cell(points[-1].get(column)) for column in columns)]
        for run, points in runs.items()
    ]
    return table(["run", *columns], rows, kind="numbers")
