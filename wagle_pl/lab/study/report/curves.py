"""Figures of forgetting against utility, and of plants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from wagle_pl.lab.study.report.figures import PALETTE

Point = tuple[float, float]

# Each role of a model has a line style and a marker, too, so that its colour is not needed.
_LINES = {"target": (0, (5, 2)), "retrained": (0, (1.5, 1.5))}
_MARKERS = {"target": "s", "retrained": "D"}
_ARM_COLOURS = (  # visible on a light and on a dark page
    *("#d1495b", "#2a9d8f", "#3d7dd8", "#c77d1e"),
    *("#8e5bd0", "#5f9e3a", "#c2489b", "#8a7a55"),
)
_ARM_LINES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
_LEGEND_WIDTH = 2.2  # inches


# -- forgetting against utility --------------------------------------------------------------------


def study_overview(
    arms: Mapping[str, Mapping[str, Sequence[Point]]],
    first: str,
    references: Mapping[str, Point],
    level: Optional[float],
    labels: tuple[str, str],
) -> Any:
    """One panel per objective, one line per mask: eight are solid, later ones dashed and thinner.

    Args:
        arms: objective -> mask -> (forget measure, utility) along the arm's curve; ``target`` and
            ``retrained``, if they have one, are drawn as such.
        first: the mask that the others are compared with.
        references: ``target`` and ``retrained`` -> their point.
        level: forget measure at which utilities are compared.
        labels: of the axes.
    """
    names = dict.fromkeys(mask for panel in arms.values() for mask in panel)
    size = (max(4.8, 3.8 * len(arms)) + _LEGEND_WIDTH, max(3.9, 0.16 * len(names) + 0.8))
    figure, all_axes = panels(*size, len(arms))
    masks = [mask for mask in names if mask != first and mask not in _LINES]
    curves = [points for panel in arms.values() for points in panel.values()]
    bounds = bounds_of([*(point for points in curves for point in points), *references.values()])
    for axes, (objective, panel) in zip(all_axes, arms.items(), strict=True):
        for mask, points in panel.items():
            style: dict[str, Any] = {"color": PALETTE["ink"], "linewidth": 2.2}
            if mask in _LINES:
                style |= {"color": PALETTE[mask], "linestyle": _LINES[mask]}
            elif mask != first:
                turn, i = divmod(masks.index(mask), len(_ARM_COLOURS))
                style = {"color": _ARM_COLOURS[i], "linewidth": max(0.7, 1.6 - 0.4 * turn)}
                style["linestyle"] = _ARM_LINES[turn % len(_ARM_LINES)]
            axes.plot(*zip(*points, strict=True), label=mask, **style)
        for role, (x, y) in references.items():
            point = {"marker": _MARKERS[role], "color": PALETTE[role], "linestyle": "none"}
            axes.plot(x, y, markersize=7, label=role, zorder=4, **point)
        if level is not None:
            line = {"color": PALETTE["retrained"], "linestyle": _LINES["retrained"]}
            axes.axvline(level, linewidth=1, zorder=1, **line)
        axes.set(xlim=bounds[:2], ylim=bounds[2:], xlabel=labels[0], ylabel=labels[1])
        axes.set_title(objective, fontsize=9)
    _add_legend(figure, size=7.5)
    return figure


# -- plants ----------------------------------------------------------------------------------------


def plants_overview(entries: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> Any:
    """One panel per plant, one row for each of the ``scores``, from above: its AUROC before planting
    (a ring) and after (a dot). Entries are those of ``plants.summarise``."""
    names = list(dict.fromkeys(entry["plant"] for entry in entries))
    means = [entry[key].mean for entry in entries for key in ("auroc_before", "auroc")]
    low, high, *_ = bounds_of([(mean, 0) for mean in means])
    low, high = min(low, 0.4), max(high, 0.7)  # 0.51 must not look far from chance
    figure, all_axes = panels(1.6 + 2.1 * len(names), 1.0 + 0.24 * len(scores), len(names))
    for axes, plant in zip(all_axes, names, strict=True):
        of_plant = [entry for entry in entries if entry["plant"] == plant]
        rows = [scores.index(entry["score"]) for entry in of_plant]
        befores = [entry["auroc_before"].mean for entry in of_plant]
        afters, deviations, _ = zip(*(entry["auroc"] for entry in of_plant), strict=True)
        axes.axvline(0.5, color=PALETTE["muted"], linewidth=0.8, zorder=1)
        axes.hlines(rows, befores, afters, color=PALETTE["line"], linewidth=3, zorder=1)
        ring = {"facecolor": "none", "edgecolor": PALETTE["muted"], "label": "before planting"}
        axes.scatter(befores, rows, s=26, zorder=2, **ring)
        dot = {"color": PALETTE["this"], "markersize": 4.5, "capsize": 2, "label": "after"}
        axes.errorbar(afters, rows, xerr=[d or 0.0 for d in deviations], fmt="o", zorder=3, **dot)
        axes.set(title=plant, xlim=(low, high), ylim=(len(scores) - 0.5, -0.5), xlabel="AUROC")
        axes.set_yticks(range(len(scores)), scores if axes is all_axes[0] else [])
        axes.title.set_fontsize(9)
    _add_legend(figure)
    return figure


# -- axes ------------------------------------------------------------------------------------------


def panels(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    """A figure of ``width`` × ``height`` inches, and the axes of its panels, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def bounds_of(points: Sequence[Point]) -> tuple[float, ...]:
    """Smallest x, largest x, smallest y and largest y, with a margin."""
    ends: list[float] = []
    for values in zip(*points, strict=True):
        low, high = min(values), max(values)
        margin = 0.06 * ((high - low) or abs(high) or 1)
        ends += [low - margin, high + margin]
    return tuple(ends)


def _add_legend(figure: Any, size: float = 8.5) -> None:
    """One legend for all panels, on the right of them."""
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, lines, strict=True))
    style = {"loc": "outside right upper", "fontsize": size, "handlelength": 2.2}
    figure.legend(shown.values(), shown.keys(), **style)
