"""A model beside others: results must be comparable, and are shown in one table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.text import table
from wagle_pl.data.template import differing_prompts
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import Direction, Info, Value
from wagle_pl.evaluation.results import Pair, Results, bare, differing, pairs_of, textless

log = logging.getLogger(__name__)

BETTER, WORSE, SAME = "▲", "▼", "="
NOTICED = 1e-6  # relative difference below which two numbers are the same


def check_prompts(results: Mapping[str, Results], prompts: Mapping[str, Any]) -> None:
    """Refuse results (``retrained``, ``target``, …) of other prompts; of the target's, warn."""
    for option, found in results.items():
        other = differing_prompts(found.prompts, prompts)
        if other and option != "target":
            raise WagleError(
                f"{found.option}: {found.path} was tested with other prompts ({other}): test that "
                "model with these, or give this run those"
            )
        if other:
            log.warning("the target's results are of other prompts: %s", other)


def check_rows(
    results: Mapping[str, Results], name: str, pairs: Sequence[Pair], instead: str
) -> None:
    """Refuse results on other rows of a test set, whatever their order; of the target's, warn.
    ``instead`` is the option that takes a retrained model's results on other rows."""
    pairs = [(bare(question), bare(answer)) for question, answer in pairs]
    for option, found in results.items():
        there = pairs_of(found.tables.get(name, []))
        count = differing(pairs, there) if name in found.tables else 0
        if found.benchmark and count and textless(found.tables[name]):
            log.warning("%s has no texts: its %s rows may be others", found.path, name)
            count = abs(len(pairs) - len(there))
        if option == "tofu_retrained" and name == "forget":
            log.warning(
                "tofu/forget_quality compares %d forget rows here with %d in %s; %d are the same",
                len(pairs),
                len(there),
                found.path,
                max(len(pairs), len(there)) - count,
            )
        elif count and option == "target":
            log.warning("the target's results are on other %s rows: %d differ", name, count)
        elif count and option != "tofu_retrained":
            hint = f"TOFU's own forget quality, which compares no rows, takes it as --{instead}"
            raise WagleError(
                f"{found.option}: {found.path} is on other {name} rows: {count} differ",
                hint=hint if (option, name) == ("retrained", "forget") else None,
            )


def arrow(
    direction: Direction, here: float, target: Optional[float], retrained: Optional[float] = None
) -> str:
    """``▲`` if a model is better than the target, ``▼`` if worse, ``=`` if the same, empty if that
    is not known.

    >>> arrow("lower", 0.2, 0.9), arrow("retrained", 0.6, 0.9, 0.5), arrow("retrained", 0.6, 0.9)
    ('▲', '▲', '')
    """
    if target is None or (direction == "retrained" and retrained is None):
        return ""
    if abs(here - target) <= NOTICED * max(abs(here), abs(target)):
        return SAME
    if direction == "retrained":
        return BETTER if abs(here - retrained) < abs(target - retrained) else WORSE
    return BETTER if (here > target) == (direction == "higher") else WORSE


def comparison(
    values: Mapping[str, Value],
    info: Callable[[str], Info],
    target: Optional[Mapping[str, float]] = None,
    retrained: Optional[Mapping[str, float]] = None,
) -> str:
    """The table as text: measure, this, then target and retrained where given; undefined measures
    below it."""
    beside = {"target": target, "retrained": retrained}
    others = {name: found for name, found in beside.items() if found is not None}
    rows, undefined = [], []
    for name, value in values.items():
        if isinstance(value, Undefined):
            undefined.append(f"undefined: {name}: {value}")
            continue
        found = {other: numbers.get(name) for other, numbers in others.items()}
        mark = arrow(info(name).direction, value, found.get("target"), found.get("retrained"))
        shown = f"{value:.4g} {mark}".rstrip() if mark or target is None else f"{value:.4g}  "
        numbers = ("" if number is None else f"{number:.4g}" for number in found.values())
        rows.append([name, shown, *numbers])
    text = [table(["measure", "this", *others], rows)]
    if target is not None:
        text += ["", f"{BETTER} better, {WORSE} worse than the target model"]
    return "\n".join([*text, *undefined])
