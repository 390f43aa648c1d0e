"""A forest plot: what arms keep, or let come back, beyond dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from wagle_pl.lab.study.recovery import KEPT, WITHOUT
from wagle_pl.lab.study.report.curves import panels
from wagle_pl.lab.study.report.figures import PALETTE
from wagle_pl.lab.study.summary import spread

Differences = Mapping[str, Mapping[str, Sequence[float]]]  # panel -> arm -> one for each seed
_CONFIDENCE = 0.95


def differences(summary: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Differences from dense over the seeds of both: of the utility at equal forgetting, there in
    equal steps too, of each test set's probability that is kept, and of the forget rows' after each
    attack."""
    drawn: dict[str, dict[str, list[float]]] = {}
    arms = list(summary.get("headline") or ())
    entries = [{**arm, "title": "equal forgetting"} for arm in arms if arm.get("values")]
    for entry in summary.get("ends") or ():
        if entry["measure"] == KEPT:
            entries.append({**entry, "title": entry["what"]})
        elif entry["measure"] == summary["forget"] and entry["what"] != WITHOUT:
            entries.append({**entry, "title": f"forget rows after {entry['what']}"})
    dense = {(e["objective"], e["title"]): e["values"] for e in entries if e["mask"] == "dense"}
    for entry in entries:
        key = entry["objective"], entry["title"]
        both = sorted(entry["values"].keys() & dense.get(key, {}).keys())
        if entry["mask"] != "dense" and both:
            panel = drawn.setdefault("\n".join(key), {})
            panel[entry["mask"]] = [entry["values"][seed] - dense[key][seed] for seed in both]
    for arm in arms:
        if pairs := (arm.get("equal_steps") or {}).get("values"):
            panel = drawn.setdefault(f"{arm['objective']}\nequal forgetting and steps", {})
            panel[arm["mask"]] = list(pairs.values())
    return drawn


def forest(drawn: Differences) -> Any:
    """One panel for each measure, one row for each arm: a dot for each seed, the mean, and its 95 %
    interval by Student's t."""
    from scipy.stats import t

    names = list(dict.fromkeys(arm for arms in drawn.values() for arm in arms))
    figure, all_axes = panels(1.8 + 2.0 * len(drawn), 1.0 + 0.24 * len(names), len(drawn))
    for axes, (title, arms) in zip(all_axes, drawn.items(), strict=True):
        axes.axvline(0, color=PALETTE["muted"], linewidth=0.8, zorder=1)
        for arm, values in arms.items():
            row, (mean, deviation, count) = names.index(arm), spread(values)
            axes.plot(values, [row] * count, "o", color=PALETTE["muted"], markersize=2.5)
            axes.plot(mean, row, "D", color=PALETTE["this"], markersize=4, zorder=3)
            if deviation is not None:
                reach = t.ppf((1 + _CONFIDENCE) / 2, count - 1) * deviation / sqrt(count)
                axes.hlines(row, mean - reach, mean + reach, color=PALETTE["this"], linewidth=1.4)
        values = [value for of_arm in arms.values() for value in of_arm]
        margin = 0.3 * (max(values) - min(values) or 0.1)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="difference from dense")
        axes.set_xlim(min([0.0, *values]) - margin, max([0.0, *values]) + margin)
        axes.set_yticks(range(len(names)), names if axes is all_axes[0] else [])
        axes.set_title(title, fontsize=8)
    return figure
