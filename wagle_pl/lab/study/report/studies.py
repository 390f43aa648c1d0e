"""Sections of a report about studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Optional

from markupsafe import Markup

from wagle_pl.core.errors import WagleError
from wagle_pl.core.html import element, facts, note, number, table
from wagle_pl.core.text import count, short_number
from wagle_pl.lab.study import recovery
from wagle_pl.lab.study.report import curves
from wagle_pl.lab.study.report.figures import figure, heatmaps, image
from wagle_pl.lab.study.report.sources import StudyResults, reference_points
from wagle_pl.lab.study.text import about, by_objective, marked_name, progress, rates_of
from wagle_pl.masks import WeightMask

#: Columns of a study's table of all runs.
_SHOWN = (
    *("objective", "mask", "density", "lr", "seed", "step", "forget", "utility", "seconds", "note"),
)
_DENSE = "dense"  # the mask that selects everything: what the others are compared with

Blocks = Iterator[Markup]  # of a section


def study_blocks(study: StudyResults) -> Blocks:
    """A study: its comparison at equal forgetting, the mean curves, its masks and runs."""
    summary, (forget, utility) = study.summary, study.axes
    runs = {row["run"]: row for row in sorted(study.rows, key=itemgetter("step"))}  # the last tests
    runs = {run: runs[run] for run in dict.fromkeys(row["run"] for row in study.rows)}
    yield facts(
        [
            ("folder", element("code", str(study.folder))),
            *settings(study).items(),
            ("runs", len(runs)),
            ("test points", len(study.rows)),
            ("forget measure", forget),
            ("utility measure", utility),
        ]
    )
    if study.references:
        points = study.references.items()
        rows = [(element("span", role, class_=f"role {role}"), *point) for role, point in points]
        yield table(["model", forget, utility], rows)
    if lacking := [role for role in ("target", "retrained") if role not in study.references]:
        yield note(f"The study holds no numbers of the {' and the '.join(lacking)} model.")
    yield element("h3", "Headline")
    if text := progress(summary):
        yield note(text)
    yield from (
        _headline(study)
        if summary.get("headline")
        else [note("The study has not compared its arms at equal forgetting yet.")]
    )
    if summary.get("ends"):
        yield from _ends(summary)
    yield element("h3", "Masks")
    yield from _masks_of(study)
    columns = [c for c in _SHOWN if any(row.get(c) is not None for row in study.rows)]
    rows = [[run, *(row[column] for column in columns)] for run, row in runs.items()]
    title = element("summary", "Every run at its last test point")
    yield element("details", title, table(["run", *columns], rows))
    yield from (note(f"{study.name}: {text}.") for text in study.notes)


def _headline(study: StudyResults) -> Blocks:
    """The comparison at equal forgetting: a table for each objective, and the mean curves."""
    summary, (forget, utility) = study.summary, study.axes
    for objective, arms in by_objective(summary).items():
        cells = [compared(arm) for arm in arms]
        used = [name for name in cells[0] if any(row[name] is not None for row in cells)]
        rows = [
            [marked_name(arm), *(row[name] for name in used)]
            for arm, row in zip(arms, cells, strict=True)
        ]
        yield element("h4", objective)
        yield table(["mask", *used], rows, "numbers mixed")
    level = summary.get("forget_level")
    where = "" if level is None else Markup(" where {} is {}").format(forget, number(level))
    equal = "Equal forgetting: {}{}. Differences are from dense of the same objective."
    yield note(Markup(equal).format(utility, where))
    yield _list(about(summary))
    if drawing := mean_curves(summary):
        drawn = _curves_image("Mean curve of each arm", drawing)
        caption = "Each arm with the best learning rate of each seed, utility averaged over seeds."
        yield figure(drawn, caption)


def _ends(summary: Mapping[str, Any]) -> Blocks:
    """What is kept at the ends of the runs, and what attacks bring back."""
    yield element("h3", "Kept, and brought back")
    for title, header, rows in recovery.tables(summary["ends"]):
        yield table(header, rows, "numbers mixed", title)
    yield _list(recovery.about(summary["ends"]))
    for attack, drawing in recovery_curves(summary).items():
        caption = f"{attack}: forget probability along the attack, mean over seeds."
        yield figure(_curves_image(f"Recovery by {attack}", drawing), caption)


def _masks_of(study: StudyResults) -> Blocks:
    """Heat maps of the masks that a study keeps, and which of them cannot be read."""
    found, unread = {}, []
    for file in sorted((study.folder / "masks").glob("*.safetensors")):
        try:
            mask = WeightMask.load(file)
            mask.grid()  # reads all of it
            found[file.stem] = mask
        except WagleError as error:
            unread.append(note(f"{error}."))
    yield heatmaps(found)
    yield from unread
    if not found and not unread:
        yield note(f"The study keeps no masks in {study.folder}/masks.")


def _list(lines: Sequence[str]) -> Markup:
    return element("ul", *(element("li", line) for line in lines), class_="note")


def compared(arm: Mapping[str, Any]) -> dict[str, Any]:
    """An arm of ``study.json`` by columns of ``study.md``; None where there is nothing."""
    area, equal_steps = arm.get("area") or {}, arm.get("equal_steps") or {}
    reached = arm.get("reached")
    return {
        "utility": _mean(arm),
        "seeds": f"{arm['n']}/{arm['seeds']}" if arm.get("seeds") is not None else None,
        "reach": reached
        if reached is None
        else number(reached, f"{reached:.0%}") + f" of {arm['runs']}",
        "against dense": arm.get("verdict") or None,
        "difference": arm.get("difference"),
        "p": arm["p"] if arm.get("p") is not None else arm.get("why") or None,
        "equal steps": equal_steps.get("difference"),
        "equal steps: p": equal_steps.get("p"),
        "area": _mean(area),
        "area: difference": area.get("difference"),
        "area: p": area.get("p"),
        "lr": rates_of(arm) or None,
        "steps": arm.get("steps"),
        "MU": arm.get("model_utility"),
        "UE": arm.get("ue_average"),
        "UT": arm.get("ut_average"),
    }


def _mean(found: Mapping[str, Any]) -> Optional[Markup]:
    """A mean, its standard deviation, and over how many seeds."""
    if found.get("mean") is None:
        return None
    deviation = Markup(" ± ") + number(found["std"]) if found.get("std") is not None else ""
    return number(found["mean"]) + deviation + element("small", count(found["n"], "seed"))


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


def mean_curves(summary: Mapping[str, Any]) -> Optional[tuple[Any, ...]]:
    """Arguments of :func:`curves.study_overview` for the mean curve of each arm; None if no arm has
    one yet. The arms with the best utility at equal forgetting have the plainest lines."""
    arms: dict[str, dict[str, Any]] = {}
    for objective, ranking in by_objective(summary).items() if summary.get("headline") else ():
        curved = {arm["mask"]: arm["curve"] for arm in ranking if arm.get("curve")}
        arms |= {objective: curved} if curved else {}
    if not arms:
        return None
    axes = (summary["forget"], summary["utility"])
    references = reference_points(summary, axes)
    return arms, _DENSE, references, summary.get("forget_level"), axes


def recovery_curves(summary: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Attack -> arguments of :func:`curves.study_overview` for the arms' mean curves of recovery."""
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in summary.get("ends") or ():
        if entry.get("curve"):
            panel = arms.setdefault(entry["what"], {}).setdefault(entry["objective"], {})
            panel[entry["mask"]] = entry["curve"]
            panel |= {"retrained": entry["retrained_curve"]} if entry["retrained_curve"] else {}
    labels = ("steps of relearning", "forget/probability")
    return {attack: (panels, _DENSE, {}, None, labels) for attack, panels in arms.items()}


def _curves_image(title: str, drawing: tuple[Any, ...]) -> Markup:
    description = ". ".join(
        f"{objective}, {mask}: from {_pair(points[0])} to {_pair(points[-1])}"
        for objective, panel in drawing[0].items()
        for mask, points in panel.items()
    )
    return image(title, description, curves.study_overview, *drawing)


def _pair(point: Sequence[float]) -> str:
    return f"({short_number(point[0])}, {short_number(point[1])})"
