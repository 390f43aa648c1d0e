"""What the section about a study shows: comparison at equal forgetting, curves, masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Optional

from markupsafe import Markup

from wagle_pl.core.errors import WagleError
from wagle_pl.core.text import short_number
from wagle_pl.masks import WeightMask
from wagle_pl.study.report import curves
from wagle_pl.study.report.sections import heatmaps
from wagle_pl.study.report.sources import StudyResults, reference_points
from wagle_pl.study.report.svg import svg
from wagle_pl.study.text import about, by_objective, marked_name, progress, rates_of

#: Columns of the table of all runs.
_SHOWN = (
    *("objective", "mask", "density", "lr", "seed", "step", "forget", "utility", "seconds", "note"),
)
DENSE = "dense"  # the mask that selects everything: what the others are compared with

Row = Mapping[str, Any]


def shown_of_study(study: StudyResults, name: str) -> dict[str, Any]:
    """What the template of a study is given.

    Args:
        study: to show.
        name: prefix of ids in the page.
    """
    summary, runs = study.summary, runs_of(study.rows)
    headline = {}
    for objective, arms in by_objective(summary).items() if summary.get("headline") else ():
        cells = [(marked_name(arm), compared(arm)) for arm in arms]
        used = [name for name in cells[0][1] if any(row[name] is not None for _, row in cells)]
        headline[objective] = (used, cells)
    found, unread = masks(study)
    heat = heatmaps(found, f"{name}-mask")
    return {
        "study": study,
        "id": name,
        "runs": runs,
        "columns": [c for c in _SHOWN if any(row.get(c) is not None for row in study.rows)],
        "settings": settings(study),
        "progress": progress(summary),
        "headline": headline,
        "about": about(summary) if headline else [],
        "overview": overview_svg(study, name),
        "panels": arm_panels(study, runs, name),
        "masks": {title: (mask, heat[title]) for title, mask in found.items()},
        "unread": unread,
    }


def settings(study: StudyResults) -> dict[str, str]:
    """What the runs have in common and what differs: name in the plural -> values."""
    names = {"density": "densities", "lr": "learning rates"}
    found = {}
    for column in ("objective", "mask", "density", "lr", "seed"):
        values = {row[column]: None for row in study.rows if row.get(column) is not None}
        numeric = all(isinstance(value, (int, float)) for value in values)
        texts = [f"{value:g}" for value in sorted(values)] if numeric else map(str, values)
        found[names.get(column, f"{column}s")] = ", ".join(texts)
    return found


def compared(arm: Mapping[str, Any]) -> dict[str, Any]:
    """An arm of ``study.json`` by columns of ``study.md``; None where there is nothing."""
    area, equal_steps = arm.get("area") or {}, arm.get("equal_steps") or {}
    return {
        "utility": arm if arm.get("mean") is not None else None,
        "seeds": f"{arm['n']}/{arm['seeds']}" if arm.get("seeds") is not None else None,
        "reach": arm if arm.get("reached") is not None else None,
        "against dense": arm.get("verdict") or None,
        "difference": arm.get("difference"),
        "p": arm["p"] if arm.get("p") is not None else arm.get("why") or None,
        "equal steps": equal_steps.get("difference"),
        "equal steps: p": equal_steps.get("p"),
        "area": area if area.get("mean") is not None else None,
        "area: difference": area.get("difference"),
        "area: p": area.get("p"),
        "lr": rates_of(arm) or None,
        "steps": arm.get("steps"),
        "MU": arm.get("model_utility"),
        "UE": arm.get("ue_average"),
        "UT": arm.get("ut_average"),
    }


def overview(summary: Mapping[str, Any]) -> Optional[Any]:
    """The mean curve of each arm as a ``matplotlib.figure.Figure``; None if no arm has one yet.

    Args:
        summary: content of ``study.json``. The arms with the best utility at equal forgetting have
            the plainest lines.
    """
    arms: dict[str, dict[str, Any]] = {}
    for objective, ranking in by_objective(summary).items() if summary.get("headline") else ():
        curved = {arm["mask"]: arm["curve"] for arm in ranking if arm.get("curve")}
        arms |= {objective: curved} if curved else {}
    if not arms:
        return None
    axes = (summary["forget"], summary["utility"])
    references = reference_points(summary, axes)
    return curves.study_overview(arms, DENSE, references, summary.get("forget_level"), axes)


def overview_svg(study: StudyResults, name: str) -> Optional[Markup]:
    """:func:`overview` as an element of the page."""
    arms = [arm for arm in study.summary.get("headline") or [] if arm.get("curve")]
    ends = ((arm, _pair(arm["curve"][0]), _pair(arm["curve"][-1])) for arm in arms)
    description = ". ".join(
        f"{arm['objective']}, {arm['mask']}: from {start} to {end}" for arm, start, end in ends
    )
    what = "Mean curve of each arm"
    return svg(f"{name}-overview", what, description, overview, study.summary) if arms else None


def runs_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Run -> its tests in the order of its steps."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return {run: sorted(tests, key=itemgetter("step")) for run, tests in runs.items()}


def arm_panels(
    study: StudyResults, runs: Mapping[str, Sequence[Row]], name: str
) -> dict[str, dict[str, Markup]]:
    """Objective -> mask -> figure of its runs; all of one objective have the same axes."""
    rates = sorted({row["lr"] for row in study.rows})
    arms: dict[str, dict[str, list[curves.Line]]] = {}
    for run in runs.values():
        rate, by_mask = run[0]["lr"], arms.setdefault(run[0]["objective"], {})
        pairs = [(test.get("forget"), test.get("utility")) for test in run]
        if points := [pair for pair in pairs if None not in pair and all(map(math.isfinite, pair))]:
            line = curves.Line(points, f"lr {rate:g}", rates.index(rate))
            by_mask.setdefault(run[0]["mask"], []).append(line)
    references = study.references
    level = study.summary.get("forget_level", references.get("retrained", (None,))[0])
    found: dict[str, dict[str, Markup]] = {}
    for i, (objective, by_mask) in enumerate(arms.items()):
        points = [point for lines in by_mask.values() for line in lines for point in line.points]
        bounds = curves.bounds_of([*points, *references.values()])
        found[objective] = {}
        for j, (mask, lines) in enumerate(by_mask.items()):
            lines = sorted(lines, key=attrgetter("group"))
            title = f"Forgetting against utility, {objective}, {mask}"
            description = ". ".join(
                f"{line.label}: {', '.join(map(_pair, line.points))}" for line in lines
            )
            dense = [line.points for line in by_mask.get(DENSE, ()) if mask != DENSE]
            drawing = (lines, dense, references, level, bounds, study.axes)
            figure = svg(f"{name}-{i}-{j}", title, description, curves.study_panel, *drawing)
            found[objective][mask] = figure
    return found


def masks(study: StudyResults) -> tuple[dict[str, WeightMask], list[str]]:
    """Masks that the study keeps, by name, and what is wrong with those that cannot be read."""
    found, unread = {}, []
    for file in sorted((study.folder / "masks").glob("*.safetensors")):
        try:
            mask = WeightMask.load(file)
            mask.grid()  # reads all of it
            found[file.stem] = mask
        except WagleError as error:
            unread.append(str(error))
    return found, unread


def _pair(point: Sequence[float]) -> str:
    return f"({short_number(point[0])}, {short_number(point[1])})"
