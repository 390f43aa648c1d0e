"""Figures of numbers that other rooms computed; each has a text that says the same."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.text import percent, table

#: Layer (``"0"``, ``"1"``, …, or ``"other"``) -> module -> share of its weights selected, in [0, 1].
Grid = Mapping[str, Mapping[str, float]]

FORMATS = (".png", ".svg")

_OUTSIDE = "other"
_LAST = "norms"
_PANELS_A_ROW = 4
_CELLS_WITH_TEXT = 1200  # beyond, cells shrink and hold no text, and every fifth layer has a label
_COLOURS = "YlGnBu"
_SHADES = 64  # of the colour bar, each a shape of an SVG
_ABSENT = "#d9d9d9"
_TICKS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)


def mask_heatmap(
    stats_by_title: Mapping[str, Grid],
    title: Optional[str] = None,
    scale_to: Optional[float] = None,
) -> Any:
    """Heat map of the share of selected weights by layer × module type, one panel a mask, one colour scale for all.

    What lies outside the layers (embeddings, final norm, output head) has a strip of its own below. Cells of modules
    that a layer lacks are grey.

    Args:
        stats_by_title: title of the panel -> shares, see :meth:`wagle_pl.masks.mask.WeightMask.grid`.
        title: of the figure.
        scale_to: share at the end of the colour scale, to compare figures; the largest share when None.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    panels = [_Panel(name, grid, stats_by_title.values()) for name, grid in stats_by_title.items()]
    rows, columns, outside = (
        len(names) for names in (panels[0].layers, panels[0].modules, panels[0].outside)
    )
    with_text = len(panels) * (rows * columns + outside) <= _CELLS_WITH_TEXT
    cell_width, cell_height = (0.44, 0.22) if with_text else (0.37, 0.13)
    across = min(_PANELS_A_ROW, len(panels))
    down = -(-len(panels) // across)
    heights = [height for height in (rows, min(1, outside)) if height]
    panel_width = max(columns, 2 * outside, 6) * cell_width
    panel_height = sum(heights) * cell_height + 0.75 + 0.5 * bool(outside)
    figure = Figure(
        figsize=(across * (panel_width + 0.2) + 1.4, down * panel_height + 0.5),
        layout="constrained",
    )
    figure.suptitle(title or "Share of selected weights (%) by layer and module type", fontsize=11)
    # A square root keeps the shares of a sparse mask apart beside a few cells that are selected nearly whole.
    largest = 100 * (
        scale_to or max((share for panel in panels for share in panel.shares), default=0)
    )
    scale = PowerNorm(0.5, 0, largest or 1)
    outer = figure.add_gridspec(down, across + 1, width_ratios=[*[panel_width] * across, 0.14])
    for i, panel in enumerate(panels):
        inner = outer[i // across, i % across].subgridspec(len(heights), 1, height_ratios=heights)
        panel.draw(figure, inner, scale, with_text, leftmost=i % across == 0)
    shades = ScalarMappable(scale, colormaps[_COLOURS].resampled(_SHADES))
    bar = figure.colorbar(shades, cax=figure.add_subplot(outer[:, -1]))
    bar.solids.set(
        rasterized=False, edgecolor="face"
    )  # an SVG of it holds no picture, and no seams
    ticks = [0.0]
    for tick in _TICKS:  # as many as the bar has room for
        if (
            tick <= largest
            and (tick / largest) ** 0.5 - (ticks[-1] / largest) ** 0.5
            > 0.2 / figure.get_figheight()
        ):
            ticks.append(tick)
    bar.set_ticks(ticks, labels=[f"{tick:g}%" for tick in ticks])
    bar.set_label("share selected (square-root scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    figure.draw_without_rendering()  # lay it out once: a layout done anew for each file would differ between them
    figure.set_layout_engine("none")
    return figure


def mask_text(stats_by_title: Mapping[str, Grid]) -> str:
    """What :func:`mask_heatmap` shows, as a table of percentages a mask."""
    parts = []
    for title, grid in stats_by_title.items():
        modules, layers, outside = axes_of([grid])
        blocks = [title]
        if layers:
            rows = [[layer, *_texts(grid[layer], modules)] for layer in layers]
            blocks.append(table(["layer", *modules], rows))
        if outside:
            blocks.append(
                table(["outside the layers", *outside], [["", *_texts(grid[_OUTSIDE], outside)]])
            )
        parts.append("\n".join(blocks))
    return "\n\n".join(parts)


def axes_of(grids: Sequence[Grid]) -> tuple[list[str], list[str], list[str]]:
    """What the grids have between them: modules of the layers (norms last), layers in order, modules outside."""
    modules = dict.fromkeys(
        module for grid in grids for layer in grid if layer != _OUTSIDE for module in grid[layer]
    )
    layers = {layer for grid in grids for layer in grid} - {_OUTSIDE}
    outside = dict.fromkeys(module for grid in grids for module in grid.get(_OUTSIDE, ()))
    return sorted(modules, key=_LAST.__eq__), sorted(layers, key=int), list(outside)


def figure_paths(output: str | Path, overwrite: bool = False) -> list[Path]:
    """The files that ``output`` names: a PNG or an SVG by its suffix, both when it has none.

    Raises:
        WagleError: if the suffix is another, or a file exists and ``overwrite`` is False.
    """
    output = Path(output)
    if output.suffix and output.suffix.lower() not in FORMATS:
        raise WagleError(f"figure {output} must end in .png or .svg, or have no suffix for both")
    paths = (
        [output]
        if output.suffix
        else [output.with_name(output.name + suffix) for suffix in FORMATS]
    )
    for path in paths:
        refuse_existing(path, overwrite, "--overwrite")
    return paths


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Write a figure to each path, in the format of its suffix, whole or not at all; same figure, same bytes."""
    from matplotlib import rc_context

    for path in paths:
        kind = path.suffix.lower().lstrip(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with (
            rc_context({"svg.hashsalt": "wagle_pl", "svg.fonttype": "none"}),
            atomic_path(path) as temporary,
        ):
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)


class _Panel:
    """One mask: the map of its layers and the strip below it."""

    def __init__(self, title: str, grid: Grid, grids: Iterable[Grid]) -> None:
        self.title = title
        self.grid = grid
        self.modules, self.layers, self.outside = axes_of(list(grids))
        self.shares = [share for row in grid.values() for share in row.values()]

    def draw(self, figure: Any, inner: Any, scale: Any, with_text: bool, leftmost: bool) -> None:
        """Add the panel's axes to the figure."""
        axes = [figure.add_subplot(cell) for cell in inner]
        wide = max(24, 5 * len(self.modules))
        axes[0].set_title(
            "\n".join(textwrap.fill(line, wide) for line in self.title.split("\n")), fontsize=9
        )
        if self.layers:
            _cells(
                axes[0],
                [self.grid.get(layer, {}) for layer in self.layers],
                self.modules,
                scale,
                with_text,
            )
            ticks = range(0, len(self.layers), 1 if with_text else 5) if leftmost else ()
            axes[0].set_yticks([i + 0.5 for i in ticks], [self.layers[i] for i in ticks])
            axes[0].set_ylabel("layer" if leftmost else "", fontsize=9)
        if self.outside:
            _cells(axes[-1], [self.grid.get(_OUTSIDE, {})], self.outside, scale, with_text)
            axes[-1].set_yticks([])
            axes[-1].set_xlabel("outside the layers", fontsize=8)


def _cells(
    axes: Any,
    rows: Sequence[Mapping[str, float]],
    columns: Sequence[str],
    scale: Any,
    with_text: bool,
) -> None:
    """Draw rows × columns of shares, the first row on top."""
    import numpy as np
    from matplotlib import rcParams

    values = np.ma.masked_invalid(
        [[100 * row.get(column, np.nan) for column in columns] for row in rows]
    )
    axes.set_facecolor(_ABSENT)
    paper = rcParams["figure.facecolor"]  # white, or a page's own
    mesh = axes.pcolormesh(values, cmap=_COLOURS, norm=scale, edgecolors=paper, linewidth=0.6)
    axes.grid(False)
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=7.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not with_text:
        return
    for (y, x), value in np.ma.ndenumerate(values):
        red, green, blue, _ = mesh.cmap(scale(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.48
        axes.text(
            x + 0.5,
            y + 0.5,
            percent(value / 100),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if light else "white",
        )


def _texts(row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{percent(row[column])}%" if column in row else "–" for column in columns]
