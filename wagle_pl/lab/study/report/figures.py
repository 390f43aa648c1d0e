"""Figures as elements of a page and as files; heat maps of masks."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib
from markupsafe import Markup

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.html import element, number
from wagle_pl.core.text import percent
from wagle_pl.masks import WeightMask
from wagle_pl.masks.grid import OUTSIDE, Grid, axes_of, mask_text

FORMATS = (".png", ".svg")

#: Colours that figures are drawn in.
PALETTE = {
    "ink": "#1b2430",
    "muted": "#5d6b7c",
    "line": "#dde3ea",
    "paper": "#ffffff",
    "target": "#a34a00",
    "retrained": "#00725c",
    "this": "#1a5fb4",
}

#: matplotlib's settings for the figures of a page.
STYLE: Any = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), PALETTE["ink"]
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PALETTE["paper"]),
    "axes.edgecolor": PALETTE["muted"],
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": PALETTE["line"],
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a name is a dollar
}

#: matplotlib's settings for SVG files: text stays text, and the same figure makes the same bytes.
SVG: Any = {"svg.hashsalt": "wagle_pl", "svg.fonttype": "none"}

_PANELS_PER_ROW = 4
_CELLS_WITH_TEXT = 1200  # with more, cells are smaller, without text; every fifth layer is labelled
_COLOURS = "YlGnBu"


# -- in a page, and in files -----------------------------------------------------------------------


def image(title: str, description: str, draw: Callable[..., Any], *arguments: Any) -> Markup:
    """A figure as an element of a page, with the SVG inside.

    Args:
        title: what the figure is.
        description: what it shows, in words and numbers.
        draw: makes a matplotlib figure from ``arguments``, under :data:`STYLE`.
    """
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE | SVG):
        drawn = draw(*arguments)
        drawn.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    width = f"width: {drawn.get_figwidth():.2f}in"
    return element("img", src=source, alt=description, title=title, style=width)


def figure_paths(output: str | Path, overwrite: bool = False) -> list[Path]:
    """The files that ``output`` names: a PNG or an SVG by its suffix, both when it has none."""
    output = Path(output)
    if output.suffix and output.suffix.lower() not in FORMATS:
        raise WagleError(f"figure {output} must end in .png or .svg, or have no suffix for both")
    suffixes = (output.suffix,) if output.suffix else FORMATS
    paths = [output.with_name(output.stem + suffix) for suffix in suffixes]
    for path in paths:
        refuse_existing(path, overwrite, "--overwrite")
    return paths


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Write a figure to each path, in the format of its suffix; the same figure, the same bytes."""
    for path in paths:
        kind = path.suffix.lower().lstrip(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with matplotlib.rc_context(SVG), atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)


def figure(drawn: Markup, caption: str | Markup) -> Markup:
    return element("figure", drawn, element("figcaption", caption))


def heatmaps(masks: Mapping[str, WeightMask]) -> Markup:
    """Heat map of each mask, by its title, all on one colour scale, side by side."""
    grids = {title: mask.grid() for title, mask in masks.items()}
    largest = largest_share(grids.values())
    figures = []
    for title, mask in masks.items():
        what = f"Share of weights selected by layer and module: {title}"
        shares = {title: grids[title]}
        drawn = image(what, mask_text(shares), mask_heatmap, {"": grids[title]}, "", largest)
        density = number(mask.density, f"{mask.density:.2%}")
        caption = "{}: {} of {:,} weights selected by {}"
        caption = Markup(caption).format(title, density, mask.total, mask.origin)
        figures.append(figure(drawn, caption))
    return element("div", *figures, class_="grid") if figures else Markup()


# -- masks -----------------------------------------------------------------------------------------


def mask_heatmap(
    grids: Mapping[str, Grid], title: Optional[str] = None, scale_to: Optional[float] = None
) -> Any:
    """Heat map of the share of selected weights by layer × module type: a panel per mask, by its
    title, and one colour scale, up to ``scale_to`` or the largest share. Embeddings, final norm and
    output head are a row below the layers; cells of modules that a layer lacks are grey."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    modules, layers, outside = axes_of(grids.values())
    with_text = len(grids) * (len(layers) * len(modules) + len(outside)) <= _CELLS_WITH_TEXT
    cell_width, cell_height = (0.44, 0.22) if with_text else (0.37, 0.13)
    heights = [rows for rows in (len(layers), min(1, len(outside))) if rows]
    width = max(len(modules), 2 * len(outside), 6) * cell_width
    height = sum(heights) * cell_height + 0.75 + 0.5 * bool(outside)
    across = min(_PANELS_PER_ROW, len(grids))
    down = -(-len(grids) // across)
    size = (across * (width + 0.2) + 1.4, down * height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    usual = "Share of selected weights (%) by layer and module type"
    figure.suptitle(usual if title is None else title, fontsize=11)
    # The square root keeps small shares apart even if a few cells are selected nearly whole.
    scale = PowerNorm(0.5, 0, 100 * (scale_to or largest_share(grids.values())))
    outer = figure.add_gridspec(down, across + 1, width_ratios=[*[width] * across, 0.14])
    for i, (name, grid) in enumerate(grids.items()):
        row, column = divmod(i, across)
        inner = outer[row, column].subgridspec(len(heights), 1, height_ratios=heights)
        axes = [figure.add_subplot(cell) for cell in inner]
        lines = (textwrap.fill(line, max(24, 5 * len(modules))) for line in name.split("\n"))
        axes[0].set_title("\n".join(lines), fontsize=9)
        if layers:
            rows = [grid.get(layer, {}) for layer in layers]
            _draw_cells(axes[0], rows, modules, scale, with_text)
            ticks = range(0, len(layers), 1 if with_text else 5) if column == 0 else ()
            axes[0].set_yticks([y + 0.5 for y in ticks], [layers[y] for y in ticks])
            axes[0].set_ylabel("layer" if column == 0 else "", fontsize=9)
        if outside:
            _draw_cells(axes[-1], [grid.get(OUTSIDE, {})], outside, scale, with_text)
            axes[-1].set_yticks([])
            axes[-1].set_xlabel("outside the layers", fontsize=8)
    _draw_bar(figure, figure.add_subplot(outer[:, -1]), scale)
    figure.draw_without_rendering()  # lay it out once, so that all saved files have the same layout
    figure.set_layout_engine("none")
    return figure


def largest_share(grids: Collection[Grid]) -> float:
    """The largest share of any cell, the end of a colour scale; 1 when nothing is selected."""
    shares = (share for grid in grids for row in grid.values() for share in row.values())
    return max(shares, default=0) or 1.0


def _draw_cells(
    axes: Any, rows: Sequence[Mapping[str, float]], columns: Sequence[str], scale: Any, text: bool
) -> None:
    """Draw rows × columns of shares, the first row on top."""
    import numpy as np

    shares = [[100 * row.get(column, np.nan) for column in columns] for row in rows]
    values: Any = np.ma.masked_invalid(shares)
    edges = {"edgecolors": matplotlib.rcParams["figure.facecolor"], "linewidth": 0.6}
    mesh = axes.pcolormesh(values, cmap=_COLOURS, norm=scale, **edges)
    axes.set_facecolor("#d9d9d9")  # of absent modules
    axes.grid(False)
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=7.5)
    axes.spines[:].set_visible(False)
    for (y, x), value in np.ma.ndenumerate(values) if text else ():
        red, green, blue, _ = mesh.cmap(scale(value))
        colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.48 else "white"
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        axes.text(x + 0.5, y + 0.5, percent(value / 100), **style)


def _draw_bar(figure: Any, axes: Any, scale: Any) -> None:
    """Draw the colour bar, of 64 colours: each is a shape of an SVG."""
    from matplotlib.cm import ScalarMappable

    colours = ScalarMappable(scale, matplotlib.colormaps[_COLOURS].resampled(64))
    bar = figure.colorbar(colours, cax=axes, format="{x:g}%")
    bar.solids.set(rasterized=False, edgecolor="face")  # no picture, no seams
    bar.set_label("share selected (square-root scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
