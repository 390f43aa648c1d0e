"""How to read what a study found: what the columns mean, what makes a comparison unfair, what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wagle_pl.core.text import count, decimals

#: What is shown of the ends of runs, where a suite has it: TOFU's model utility, and the averages of WAGLE's tables.
AT_END = ("model_utility", "ue_average", "ut_average")

#: Behind the name of a mask that has learning rates of its own.
MARK = "*"


def marked_name(arm: Mapping[str, Any]) -> str:
    """Name of an arm's mask, marked if it was tried with learning rates of its own.

    >>> marked_name({"mask": "lora", "own_learning_rates": True}), marked_name({"mask": "dense"})
    ('lora*', 'dense')
    """
    return str(arm.get("mask")) + (MARK if arm.get("own_learning_rates") else "")


def progress(summary: Mapping[str, Any]) -> str:
    """How many runs there are of those planned; empty if the study does not say.

    >>> progress({"runs": {"finished": 100, "planned": 942}})
    '100 of 942 runs are finished.'
    """
    runs = summary.get("runs")
    return f"{runs['finished']} of {runs['planned']} runs are finished." if runs else ""


def about(summary: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what to hold against the comparison, in whole sentences.

    Args:
        summary: content of ``study.json``.
    """
    level = decimals(summary.get("forget_level"))
    whose = (
        "the retrained model's" if summary.get("level_of") == "retrained" else "the level asked for"
    )
    lines = [
        f"utility: {summary['utility']} where {summary['forget']} reaches {level}, {whose}; best learning rate of each "
        "seed, mean ± standard deviation over seeds. Read from the curve through the run's test points, piecewise "
        "linear, points at which the run has not forgotten more than before left out.",
        "seeds: seeds that reach that level with some learning rate, of those finished. reach: share of all runs that "
        "do. What never does has no utility at equal forgetting: nothing is extrapolated.",
        "against dense: a tie is a difference within the larger of the two standard deviations, or of p 0.05 and more. "
        "p: paired t-test over seeds. difference: over the seeds of both.",
        "steps: to that level; slower runs tend to keep more, whatever the mask. equal steps: difference from dense "
        "and p, where runs of both get there in as many steps, piecewise linear over learning rates; a run that took "
        "no fewer steps than one with a slower rate is left out.",
        "area: mean utility over forgetting, from the target to the level or to where arm or dense ends first; dense's "
        "over the same range.",
    ]
    arms = summary["headline"]
    if summary.get("nothing_to_unlearn"):
        lines.insert(
            0, "The target is at that level already, or past it: there is nothing to unlearn."
        )
    if any(arm.get(name) is not None for arm in arms for name in AT_END):
        lines.append(
            "MU: TOFU's model utility. UE, UT: averages of WAGLE's tables. Of the chosen runs at their ends: "
            f"{_where(summary)}."
        )
    if any(arm.get("own_learning_rates") for arm in arms):
        lines.append(f"{MARK}: tried with learning rates of its own.")
    runs = summary.get("runs") or {"finished": 0, "planned": 0}
    uneven = len({arm.get("runs") for arm in arms if arm.get("seeds")}) > 1
    if (
        uneven and runs["finished"] < runs["planned"]
    ):  # finished, they differ by learning rates of their own
        lines.append(
            "Arms have different numbers of finished runs so far: wait for the rest before comparing."
        )
    diverged = sum(arm.get("diverged", 0) for arm in arms)
    if diverged:
        what = count(diverged, "run")
        lines.append(f"{what} diverged (loss NaN or infinite); what was tested before that counts.")
    return lines


def _where(summary: Mapping[str, Any]) -> str:
    """Where the ends of runs are, beside the level at which arms are compared."""
    ends = (summary.get("settings") or {}).get("ends_at") or {}
    if summary["forget"] in ends and ends[summary["forget"]] == summary.get("forget_level"):
        return "just past the level, as runs end there"
    return "not at equal forgetting"
