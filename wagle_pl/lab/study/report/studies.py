"""Sections of a report about studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Optional

from markupsafe import Markup

from wagle_pl.core.errors import WagleError
from wagle_pl.core.html import element, facts, note, table
from wagle_pl.core.text import short_number
from wagle_pl.lab.study.forest import differences, forest
from wagle_pl.lab.study.report import curves
from wagle_pl.lab.study.report.figures import figure, heatmaps, image, save_figure
from wagle_pl.lab.study.report.sources import StudyResults, reference_points
from wagle_pl.lab.study.text import by_objective, document, progress
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
    axes = ("objective", "mask", "lr", "seed")
    tried = {name: sorted({row[name] for row in study.rows}, key=str) for name in axes}
    yield facts(
        [
            ("folder", element("code", str(study.folder))),
            *((name, ", ".join(map(str, values))) for name, values in tried.items()),
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
    if text := progress(summary):
        yield note(text)
    if summary.get("headline"):
        yield from _comparison(summary)
    else:
        yield note("The study has not compared its arms at equal forgetting yet.")
    yield element("h3", "Masks")
    yield from _masks_of(study)
    columns = [c for c in _SHOWN if any(row.get(c) is not None for row in study.rows)]
    last = [[run, *(row[column] for column in columns)] for run, row in runs.items()]
    title = element("summary", "Every run at its last test point")
    yield element("details", title, table(["run", *columns], last))
    yield from (note(f"{study.name}: {text}.") for text in study.notes)


def _comparison(summary: Mapping[str, Any]) -> Blocks:
    """What ``study.md`` says, with the mean curves and those of recovery."""
    for kind, text, lines, content in document(summary):
        if kind == "table":
            header, rows = content
            yield table(header, rows, "numbers mixed", text)
        elif kind == "list":
            yield element("ul", *(element("li", line) for line in lines), class_="note")
        else:
            yield element("h3" if kind == "heading" else "p", text)
    if drawing := mean_curves(summary):
        drawn = _curves_image("Mean curve of each arm", drawing)
        caption = "Each arm with the best learning rate of each seed, utility averaged over seeds."
        yield figure(drawn, caption)
    for attack, drawing in recovery_curves(summary).items():
        caption = f"{attack}: forget probability along the attack, mean over seeds."
        yield figure(_curves_image(f"Recovery by {attack}", drawing), caption)


def _masks_of(study: StudyResults) -> Blocks:
    """Heat maps of the masks that a study keeps, and which of them cannot be read."""
    masks, unread = {}, []
    for file in sorted((study.folder / "masks").glob("*.safetensors")):
        try:
            mask = WeightMask.load(file)
            mask.grid()  # reads all of it
            masks[file.stem] = mask
        except WagleError as error:
            unread.append(note(f"{error}."))
    yield heatmaps(masks)
    yield from unread
    if not masks and not unread:
        yield note(f"The study keeps no masks in {study.folder}/masks.")


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


def save_curves(summary: Mapping[str, Any], folder: Path) -> None:
    """Write the curves of a study's arms, those of recovery, and the differences from dense."""
    for name, drawing in {"study": mean_curves(summary), **recovery_curves(summary)}.items():
        if drawing is not None:
            save_figure(curves.study_overview(*drawing), [folder / f"{name}.svg"])
    if drawn := differences(summary):
        save_figure(forest(drawn), [folder / "differences.svg"])


def _curves_image(title: str, drawing: tuple[Any, ...]) -> Markup:
    description = ". ".join(
        f"{objective}, {mask}: from {_pair(points[0])} to {_pair(points[-1])}"
        for objective, panel in drawing[0].items()
        for mask, points in panel.items()
    )
    return image(title, description, curves.study_overview, *drawing)


def _pair(point: Sequence[float]) -> str:
    return f"({short_number(point[0])}, {short_number(point[1])})"
