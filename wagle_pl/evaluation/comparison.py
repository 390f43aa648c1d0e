"""The console's table: measures of a model beside those of the target and of the retrained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Optional

from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import Direction, Info, Value

BETTER, WORSE, SAME = "▲", "▼", "="
NOTICED = 1e-6  # relative difference below which two numbers are the same


def arrow(
    direction: Direction, here: float, target: Optional[float], retrained: Optional[float] = None
) -> str:
    """``▲`` if a model is better than the target, ``▼`` if worse, ``=`` if the same, empty if nobody can say.

    Args:
        direction: what is better, see :class:`~wagle_pl.evaluation.measures.Info`.
        here: the measure of the model.
        target: of the model before unlearning.
        retrained: of the model that never saw the forget rows; what ``retrained`` compares with.

    >>> arrow("lower", 0.2, 0.9), arrow("retrained", 0.6, 0.9, 0.5), arrow("retrained", 0.6, 0.9)
    ('▲', '▲', '')
    """
    if target is None or (direction == "retrained" and retrained is None):
        return ""
    if abs(here - target) <= NOTICED * max(abs(here), abs(target)):
        return SAME
    if direction == "retrained":
        return BETTER if abs(here - retrained) < abs(target - retrained) else WORSE  # type: ignore[operator]
    return BETTER if (here > target) == (direction == "higher") else WORSE


def comparison(
    values: Mapping[str, Value],
    info: Callable[[str], Info],
    target: Optional[Mapping[str, float]] = None,
    retrained: Optional[Mapping[str, float]] = None,
) -> str:
    """The table as text: measure, this, then target and retrained where given; undefined measures below it.

    Args:
        values: of the model; an :class:`~wagle_pl.evaluation.functional.Undefined` where there is no number.
        info: measure -> what is known of it.
        target: measures of the target model.
        retrained: measures of the retrained model.

    >>> print(comparison({"a": 1.0, "b": Undefined("no rows")}, lambda name: Info("", "higher", ""), {"a": 0.5}))
    measure  this  target
    a         1 ▲     0.5
    <BLANKLINE>
    ▲ better, ▼ worse than the target model
    undefined: b: no rows
    """
    others = {
        name: found
        for name, found in (("target", target), ("retrained", retrained))
        if found is not None
    }
    lines = [["measure", "this", *others]]
    for name, value in values.items():
        if isinstance(value, Undefined):
            continue
        found = {other: numbers.get(name) for other, numbers in others.items()}
        mark = arrow(info(name).direction, value, found.get("target"), found.get("retrained"))
        shown = f"{value:.4g} {mark}".rstrip() if mark or target is None else f"{value:.4g}  "
        lines.append(
            [name, shown, *("" if number is None else f"{number:.4g}" for number in found.values())]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for name, *cells in lines:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        text.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    if target is not None:
        text += ["", f"{BETTER} better, {WORSE} worse than the target model"]
    for name, value in values.items():
        if isinstance(value, Undefined):
            text.append(f"undefined: {name}: {value}")
    return "\n".join(text)
