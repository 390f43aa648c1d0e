"""What is kept, and what attacks bring back, if runs end at the level of forgetting.

Such a run ends at the first test at which the level is reached; its final model is tested in full,
and attacked if the study says so. An arm is represented by the runs that
:func:`~wagle_pl.lab.study.summary.chosen` selects: those with the best learning rate of each seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import pandas as pd

from wagle_pl.evaluation.attacks.attack import PREFIX
from wagle_pl.evaluation.attacks.weights import STEP
from wagle_pl.evaluation.results import BETTER, WORSE
from wagle_pl.lab.study.summary import (
    NEVER,
    Compared,
    Row,
    arms_of,
    decimals,
    mean_std,
    paired,
    spread,
    utility_at,
    verdict,
)

#: Measures under attack that are compared in addition to the study's, named without the test set.
SHORT = ("probability", "rougeL_recall")
PROBED = "accuracy"  # of a probe: its name has no test set
WITHOUT = "no attack"
KEPT = "probability kept"
HALF = "steps to half"  # steps of an attack that bring back half of what was forgotten
MARKS = {"wins": f" {BETTER}", "loses": f" {WORSE}"}

Entry = Mapping[str, Any]  # of what :func:`at_the_level` returns


class Column(NamedTuple):
    """A measure that is compared, and the column of the study's table that holds it."""

    what: str  # the attack with its option, "no attack", or a test set
    measure: str
    column: str
    sign: int = -1  # 1 if more is better

    def of(self, values: Mapping[str, Any]) -> Optional[float]:
        return values.get(self.column)


class Curve(NamedTuple):
    """The forget rows' probability along an attack by fine-tuning."""

    what: str
    columns: Mapping[int, str]  # step -> column of the study's table
    start: float  # the target's, before the attack
    measure: str = HALF
    sign: int = 1

    def points(self, values: Mapping[str, Any]) -> list[tuple[int, float]]:
        """(step, probability) of a model; empty if it was not attacked."""
        pairs = [(step, values.get(name)) for step, name in self.columns.items()]
        return [] if any(value is None for _, value in pairs) else pairs

    def of(self, values: Mapping[str, Any]) -> Optional[float]:
        """Steps to half of the way back to the target, None if it does not get there."""
        points = self.points(values)
        if not points:
            return None
        half = (points[0][1] + self.start) / 2
        return utility_at([(value, float(step)) for step, value in points], half)


def columns_of(rows: Sequence[Row], by: Compared) -> list[Column | Curve]:
    """The columns of a study's table to compare; none if that would be only the utility."""
    names = sorted({name for row in rows for name, value in row.items() if value is not None})
    forgotten = by.forget.partition("/")[0]
    kept: list[Column | Curve] = []
    measured: list[Column | Curve] = []
    curves: dict[str, dict[int, str]] = {}
    for name in names:
        first, _, rest = name.partition("/")
        if rest == "probability" and not first.startswith("forget"):
            kept.append(Column(first, KEPT, name, sign=1))
        if first != PREFIX:
            continue
        attack, _, measure = rest.partition("/")
        head, step, number = measure.rpartition(STEP)
        if step and head == f"{forgotten}/probability":
            curves.setdefault(attack, {})[int(number)] = name
        elif measure in (by.forget, PROBED) or measure.rpartition("/")[2] in SHORT:
            measured.append(Column(attack, measure, name))
    plain = [measure for measure in dict.fromkeys(c.measure for c in measured) if measure in names]
    measured = [*(Column(WITHOUT, measure, measure) for measure in plain), *measured]
    for attack, steps in curves.items():
        ordered = dict(sorted(steps.items()))
        if (start := by.target.get(ordered.get(0, ""))) is not None:
            measured.append(Curve(attack, ordered, start))
    return [*(kept if measured or len(kept) > 1 else ()), *measured]


def at_the_level(
    rows: Sequence[Row], by: Compared, retrained: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One dict for each arm and measure, at the ends of runs that end at the level.

    Each has ``objective``, ``mask``; ``measure`` and ``what``: the attack or "no attack" for a
    measure of forget rows, the test set for ``probability kept``; ``mean``, ``std`` and ``n`` over
    the seeds whose chosen run has the measure, out of the ``seeds`` that reach the level, and
    ``values``, seed -> value; ``target`` and ``retrained``, the values of these models under the
    same attack; ``difference`` from dense over the seeds of both, its ``p``, or ``why`` there is
    none; and ``verdict``: the arm that keeps more, or of which less comes back, wins.
    ``steps to half`` is a measure of attacks with a curve, which is in ``curve``: (step, mean
    probability of the forget rows); seeds for which half does not come back are not in ``n``.
    """
    columns = columns_of(rows, by)
    if not columns:
        return []
    last = {row["run"]: row for row in rows if row.get("forget") is not None}  # in order of steps
    _, best, dense_of = arms_of(rows, by)
    entries = []
    for (objective, mask), mine in best.items():
        ended, dense = _ends(mine, last), dense_of.get(objective)
        theirs = {} if dense in (None, (objective, mask)) else _ends(best[dense], last)
        for column in columns:
            entry: dict[str, Any] = {"objective": objective, "mask": mask}
            entry |= {"measure": column.measure, "what": column.what}
            entry |= _compared(column, ended, theirs)
            entry |= {"target": column.of(by.target), "retrained": column.of(retrained)}
            if isinstance(column, Curve):
                entry["target"] = None  # it has nothing to bring back
                runs_of = [dict(points) for e in ended.values() if (points := column.points(e))]
                steps = column.columns if runs_of else ()
                entry["curve"] = [(s, spread([run[s] for run in runs_of]).mean) for s in steps]
                entry["retrained_curve"] = column.points(retrained)
            entries.append(entry)
    return entries


def _ends(best: pd.DataFrame, last: Mapping[str, Row]) -> dict[int, Row]:
    """Seed -> the last row of its chosen run, if that reaches the level."""
    reached = best[best["reached"].notna()]
    return {int(seed): last[run] for seed, run in reached["run"].items()}


def _compared(
    column: Column | Curve, ended: Mapping[int, Row], theirs: Mapping[int, Row]
) -> dict[str, Any]:
    ours, dense = (
        {seed: value for seed, row in of.items() if (value := column.of(row)) is not None}
        for of in (ended, theirs)
    )
    both = sorted(ours.keys() & dense.keys())
    test = paired(*([of[seed] for seed in both] for of in (ours, dense)))
    arm, other = (spread(list(of.values())) for of in (ours, dense))
    word = NEVER
    if ended:
        word = verdict(test, column.sign, arm, other, len(ended), len(theirs)) if theirs else ""
    return {
        **arm._asdict(),
        "seeds": len(ended),
        "values": {str(seed): value for seed, value in ours.items()},
        "difference": test.difference,
        "p": test.p,
        "why": test.why if theirs else "",
        "verdict": word,
    }


# -- for people ------------------------------------------------------------------------------------


def tables(entries: Sequence[Entry]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of a table for each objective and measure."""
    named = dict.fromkeys((entry["objective"], entry["measure"]) for entry in entries)
    for objective, measure in named:
        listed = [e for e in entries if (e["objective"], e["measure"]) == (objective, measure)]
        columns = {entry["what"]: entry for entry in listed}
        cells: dict[str, list[str]] = {}
        for entry in listed:
            if entry["seeds"]:
                cells.setdefault(entry["mask"], []).append(cell(entry))
        for model in ("retrained", "target"):
            digits = 1 if measure == HALF else 3
            cells[model] = [decimals(entry[model], digits) for entry in columns.values()]
        rows = [[mask, *values] for mask, values in cells.items()]
        yield f"{objective}, {measure}", ["mask", *columns], rows


def cell(entry: Entry) -> str:
    """Mean ± standard deviation over seeds, and whether that is better than dense's or worse."""
    half = entry["measure"] == HALF
    text = mean_std(entry["mean"], entry["std"], 1 if half else 3)
    text += f" ({entry['n']}/{entry['seeds']})" if half else ""
    return text + MARKS.get(entry["verdict"], "")


def about(entries: Sequence[Entry]) -> list[str]:
    """How to read the tables."""
    lines = [
        "Every run ends at the first test at which the study's level is reached. An arm is shown "
        "by its runs with the best learning rate of each seed: mean ± standard deviation over "
        "the seeds that reach the level.",
        f"{BETTER}: better than dense, {WORSE}: worse: more is kept, or less comes back (a paired "
        "t-test over three seeds or more, p < 0.05, and a difference above the larger of the two "
        "standard deviations).",
    ]
    if any(entry["what"] == WITHOUT for entry in entries):
        lines.append(
            "Under attack: compare with the retrained model under the same attack: what it answers "
            "was never there. Relearning is tested on forget rows that it is not trained on."
        )
    if any(entry["measure"] == HALF for entry in entries):
        lines.append(
            f"{HALF}: steps of fine-tuning until forget rows that are not trained on are half of the "
            "way back to the target's probability, and for how many seeds they get there."
        )
    return lines
