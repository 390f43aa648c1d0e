"""The shares of selected weights by layer and module type, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from wagle_pl.core.text import percent, table

#: Layer (``"0"``, ``"1"``, …, or ``"other"``) -> module -> share of its weights selected in [0, 1],
#: see :meth:`wagle_pl.masks.mask.WeightMask.grid`.
Grid = Mapping[str, Mapping[str, float]]
OUTSIDE = "other"


def mask_text(grids: Mapping[str, Grid]) -> str:
    """Shares of selected weights by layer and module, as tables of percentages."""

    def cells(shares: Mapping[str, float], columns: Sequence[str]) -> list[str]:
        return [f"{percent(shares[name])}%" if name in shares else "–" for name in columns]

    parts = []
    for title, grid in grids.items():
        modules, layers, outside = axes_of([grid])
        blocks = [title]
        if layers:
            rows = [[layer, *cells(grid[layer], modules)] for layer in layers]
            blocks.append(table(["layer", *modules], rows))
        if outside:
            row = ["", *cells(grid[OUTSIDE], outside)]
            blocks.append(table(["outside the layers", *outside], [row]))
        parts.append("\n".join(blocks))
    return "\n\n".join(parts)


def axes_of(grids: Collection[Grid]) -> tuple[list[str], list[str], list[str]]:
    """Modules of the layers (norms last), layers, and modules outside of them, of all grids."""
    inside = [(layer, grid[layer]) for grid in grids for layer in grid if layer != OUTSIDE]
    modules = dict.fromkeys(module for _, shares in inside for module in shares)
    outside = dict.fromkeys(module for grid in grids for module in grid.get(OUTSIDE, ()))
    layers = sorted({layer for layer, _ in inside}, key=int)
    return sorted(modules, key="norms".__eq__), layers, list(outside)
