"""Curves and scatters of numbers that other rooms computed; drawn in the page's colours, see :mod:`report.svg`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from wagle_pl.study.report.svg import COLOURS

#: What a model is to the others -> how its line is drawn; with the colour, so that no one needs to see colours.
DASHES = {"target": (0, (5, 2)), "retrained": (0, (1.5, 1.5)), "this": "solid"}
MARKERS = {"target": "s", "retrained": "D", "this": "o"}

#: Lines that are told apart: a colour that is seen on a light and on a dark page, and a dash.
_PALETTE = ("#d1495b", "#2a9d8f", "#3d7dd8", "#c77d1e", "#8e5bd0", "#5f9e3a", "#c2489b", "#8a7a55")
_STROKES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
_SHAPES = ("o", "^", "s", "D", "v", "P", "X", "*")
_ENDS = (
    1e-6,
    1e6,
)  # truth ratios beyond are drawn here: 0 and infinity have no place on a logarithmic axis
_LEGEND_HEIGHT = 0.5  # inches of a figure that its legend may take; it grows by the rest

Points = Sequence[tuple[float, float]]


class Marked(NamedTuple):
    """A point of a forget–utility figure.

    Attributes:
        x: forget measure.
        y: utility.
        role: ``target``, ``retrained`` or ``this``.
        label: written beside or inside the point.
    """

    x: float
    y: float
    role: str
    label: str


class Line(NamedTuple):
    """A run of a study.

    Attributes:
        points: (forget measure, utility) in the order of its steps.
        label: what it is labelled by.
        group: number of the label: lines of one group have one marker.
    """

    points: Points
    label: str
    group: int = 0


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of ``width`` × ``height`` inches, and its axes."""
    figure, (axes,) = new_panels(width, height, 1)
    return figure, axes


def new_panels(width: float, height: float, count: int) -> tuple[Any, list[Any]]:
    """An empty figure of ``width`` × ``height`` inches, and the axes of so many panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def forget_utility(points: Sequence[Marked], x_label: str, y_label: str) -> Any:
    """Each model as a point; labels of the runs stand inside their points.

    Args:
        points: target and retrained model among them.
        x_label: names the forget measure.
        y_label: names the utility.
    """
    figure, axes = new_figure(4.8, 3.5)
    for point in points:
        colour = COLOURS[point.role]
        if point.role == "this":
            axes.plot(point.x, point.y, "o", color=colour, markersize=13, zorder=3)
            axes.text(
                point.x,
                point.y,
                point.label,
                color=COLOURS["paper"],
                ha="center",
                va="center_baseline",
                fontsize=8.5,
                weight="bold",
                zorder=4,
            )
        else:
            axes.plot(
                point.x,
                point.y,
                MARKERS[point.role],
                color=colour,
                markersize=9,
                label=point.label,
                zorder=3,
            )
    retrained = [point.x for point in points if point.role == "retrained"]
    _level(axes, retrained[0] if retrained else None)
    _spread(axes, points)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if any(point.role != "this" for point in points):
        _legend(figure)
    return figure


def study_overview(
    arms: Mapping[str, Mapping[str, Points]],
    first: str,
    references: Mapping[str, tuple[float, float]],
    level: Optional[float],
    labels: tuple[str, str],
) -> Any:
    """A panel an objective, a line a mask: what all of a study comes to.

    Args:
        arms: objective -> mask -> (forget measure, utility) along the arm's curve; those that come first are drawn
            plainest, later ones dashed and thinner.
        first: the mask that the others are compared with.
        references: ``target`` and ``retrained`` -> their point.
        level: forget measure at which utilities are compared.
        labels: names of the forget measure and of the utility.
    """
    figure, axes = new_panels(max(4.8, 3.8 * len(arms)), 3.9, len(arms))
    masks = [
        mask
        for mask in dict.fromkeys(mask for found in arms.values() for mask in found)
        if mask != first
    ]
    bounds = bounds_of(
        [p for found in arms.values() for line in found.values() for p in line]
        + [*references.values()]
    )
    for panel, (objective, found) in zip(axes, arms.items(), strict=True):
        for mask, points in found.items():
            style = {"color": COLOURS["ink"], "linewidth": 2.2}
            if mask != first:
                turn, i = divmod(masks.index(mask), len(_PALETTE))
                stroke, width = _STROKES[turn % len(_STROKES)], max(0.7, 1.6 - 0.4 * turn)
                style = {"color": _PALETTE[i], "linestyle": stroke, "linewidth": width}
            panel.plot(*zip(*points, strict=True), label=mask, **style)
        for role, (x, y) in references.items():
            panel.plot(x, y, MARKERS[role], color=COLOURS[role], markersize=7, label=role, zorder=4)
        _level(panel, level)
        panel.set_xlim(bounds[0], bounds[1])
        panel.set_ylim(bounds[2], bounds[3])
        panel.set_title(objective, fontsize=9)
        panel.set_xlabel(labels[0])
        panel.set_ylabel(labels[1])
    _legend(figure, columns=4, size=7.5)
    return figure


def study_panel(
    lines: Sequence[Line],
    others: Sequence[Points],
    references: Mapping[str, tuple[float, float]],
    level: Optional[float],
    bounds: tuple[float, float, float, float],
    labels: tuple[str, str],
    others_label: str,
) -> Any:
    """The forget–utility curves of one arm before those of others.

    Args:
        lines: of the arm, one a run.
        others: curves in the background.
        references: ``target`` and ``retrained`` -> their point; every curve starts at the target's.
        level: forget measure at which utilities are compared.
        bounds: least x, greatest x, least y, greatest y, the same for all panels to compare.
        labels: names of the forget measure and of the utility.
        others_label: what the others are.
    """
    figure, axes = new_figure(3.6, 2.9)
    start = [references["target"]] if "target" in references else []
    for i, points in enumerate(others):
        axes.plot(
            *zip(*start, *points, strict=True),
            color=COLOURS["muted"],
            linewidth=0.9,
            alpha=0.6,
            label=others_label if i == 0 else None,
        )
    told: set[str] = set()
    for line in lines:
        label = None if line.label in told else line.label
        told.add(line.label)
        marker = _SHAPES[line.group % len(_SHAPES)]
        axes.plot(
            *zip(*start, *line.points, strict=True),
            marker=marker,
            markersize=4,
            linewidth=1.3,
            color=COLOURS["this"],
            label=label,
        )
    for role, (x, y) in references.items():
        axes.plot(x, y, MARKERS[role], color=COLOURS[role], markersize=7, label=role, zorder=4)
    _level(axes, level)
    left, right, low, high = bounds
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_xlabel(labels[0], fontsize=8)
    axes.set_ylabel(labels[1], fontsize=8)
    _legend(figure, columns=2, size=7.5)
    return figure


def distribution(values: Mapping[str, Sequence[float]], x_label: str) -> Any:
    """Shares of examples with a truth ratio of at most x: the curves that forget quality compares.

    Args:
        values: ``target``, ``retrained`` and ``this`` -> truth ratio of every example.
        x_label: names the truth ratio.
    """
    figure, axes = new_figure(3.9, 3.1)
    for role, ratios in values.items():
        kept = sorted(map(drawn, ratios))
        shares = [i / len(kept) for i in range(len(kept) + 1)]
        axes.step(
            [kept[0], *kept],
            shares,
            where="post",
            color=COLOURS[role],
            linestyle=DASHES[role],
            linewidth=1.6,
            label=role,
        )
    _logarithmic(axes, "x", [ratio for ratios in values.values() for ratio in ratios])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(x_label)
    axes.set_ylabel("share of examples")
    _legend(figure)
    return figure


def shift(pairs: Mapping[str, Points], x_label: str, y_label: str) -> Any:
    """Every example: its truth ratio at the target model, and at the others.

    Args:
        pairs: ``this`` and ``retrained`` -> (ratio at the target, ratio there) of each example.
        x_label: names the target's ratio.
        y_label: names the other's ratio.
    """
    figure, axes = new_figure(3.9, 3.1)
    everything = [drawn(value) for points in pairs.values() for point in points for value in point]
    ends = (min(everything), max(everything))
    axes.plot(ends, ends, color=COLOURS["muted"], linewidth=0.8)
    for role, points in pairs.items():
        x, y = zip(*((drawn(before), drawn(after)) for before, after in points), strict=True)
        axes.plot(
            x,
            y,
            MARKERS[role],
            color=COLOURS[role],
            markersize=4.5,
            label=role,
            linestyle="none",
            markerfacecolor=COLOURS[role] if role == "this" else "none",
        )
    for axis in "xy":
        _logarithmic(axes, axis, everything)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _legend(figure)
    return figure


def drawn(ratio: float) -> float:
    """Where a truth ratio is drawn: at the nearest end of the axis if it lies beyond.

    >>> drawn(0.0), drawn(0.5), drawn(float("inf"))
    (1e-06, 0.5, 1000000.0)
    """
    return min(max(ratio, _ENDS[0]), _ENDS[1])


def bounds_of(points: Points) -> tuple[float, float, float, float]:
    """Least and greatest x and y, with a margin."""
    ends: list[float] = []
    for values in zip(*points, strict=True):
        low, high = min(values), max(values)
        margin = 0.06 * ((high - low) or abs(high) or 1)
        ends += [low - margin, high + margin]
    return tuple(ends)  # type: ignore[return-value]


def _spread(axes: Any, points: Sequence[Marked]) -> None:
    left, right, low, high = bounds_of([(point.x, point.y) for point in points])
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def _level(axes: Any, x: Optional[float]) -> None:
    """The retrained model's forgetting: where utilities are to be compared."""
    if x is not None:
        axes.axvline(
            x, color=COLOURS["retrained"], linestyle=DASHES["retrained"], linewidth=1, zorder=1
        )


def _legend(figure: Any, columns: int = 3, size: float = 8.5) -> None:
    """One legend of all panels, below them: so many columns, or as many as the figure is wide enough for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shown = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not shown:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()  # measures without laying the figure out
    for ncols in range(columns, 0, -1):
        legend = figure.legend(
            shown.values(),
            shown.keys(),
            loc="outside lower center",
            ncols=ncols,
            fontsize=size,
            handlelength=2.2,
        )
        box = legend.get_window_extent(renderer)
        if (
            ncols == 1 or box.width <= 0.92 * figure.bbox.width
        ):  # text in an SVG is a little wider than measured here
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(0.0, box.height / figure.dpi - _LEGEND_HEIGHT))


def _logarithmic(axes: Any, name: str, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, which stay text a page can style."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{name}scale")("log")
    axis = getattr(axes, f"{name}axis")
    span = drawn(max(values)) / drawn(min(values))
    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
