"""What a study found: every arm (an objective with a mask) at equal forgetting, beside dense.

Functions take ``rows``, those of the study's table, and ``by``, what arms are compared by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd

from wagle_pl.core.errors import WagleError
from wagle_pl.study.curves import (
    Pace,
    at_equal_steps,
    envelope,
    mean_utility,
    paired,
    spread,
    utility_at,
    verdict,
)

Row = Mapping[str, Any]

#: Measures at the ends of runs, where a suite has them: TOFU's and those of WAGLE's tables.
AT_END = ("model_utility", "ue_average", "ut_average")
LABELS = ("objective", "mask", "score", "density")
CURVE_POINTS = 33  # of an arm's mean curve


class Compared(NamedTuple):
    """What arms are compared by: two measures, and the level of forgetting."""

    forget: str
    utility: str
    target: Mapping[str, float]  # measures of the target model; every curve starts there
    level: float  # value of the forget measure at which utilities are compared
    forget_sign: int = -1  # 1 if the forget measure rises as a model forgets
    utility_sign: int = 1  # −1 if less utility is better (a perplexity)

    @property
    def start(self) -> float:
        """Progress of the target model."""
        return self.forget_sign * self.target[self.forget]

    @property
    def end(self) -> float:
        """Progress at the level."""
        return self.forget_sign * self.level

    @property
    def nothing_to_unlearn(self) -> bool:
        """Whether the target is at the level, or past it, already."""
        return self.start >= self.end


def run_table(rows: Sequence[Row], by: Compared) -> pd.DataFrame:
    """One line a run.

    Returns:
        ``objective``, ``mask``, ``score``, ``density``, ``lr``, ``seed`` as in the table;
        ``points``, (progress, utility) of the target model and of each test; ``deepest``, the
        largest progress; ``reached``, the utility at the level, and ``steps`` to it (NaN if the run
        never reaches it); ``diverged``; and :data:`AT_END` of the last test.
    """
    tests: dict[str, list[Row]] = {row["run"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["step"]):
        tests[row["run"]].append(row)
    found = []
    for run in tests.values():
        tested = [r for r in run if None not in (r.get("forget"), r.get("utility"))]
        progress = [by.start, *(by.forget_sign * row["forget"] for row in tested)]
        utilities = [by.target[by.utility], *(row["utility"] for row in tested)]
        steps = [0.0, *(float(row["step"]) for row in tested)]
        points = list(zip(progress, utilities, strict=True))
        pace = list(zip(progress, steps, strict=True))
        last = tested[-1] if tested else {}
        found.append(
            {
                **{name: run[0].get(name) for name in (*LABELS, "lr", "seed")},
                "points": points,
                "deepest": max(progress),
                "reached": utility_at(points, by.end),
                "steps": utility_at(pace, by.end),
                "diverged": any("diverged" in (row.get("note") or "") for row in run),
                **{name: last.get(name) for name in AT_END},
            }
        )
    return pd.DataFrame(found).astype(dict.fromkeys(("reached", "steps", *AT_END), float))


def chosen(runs: pd.DataFrame, sign: int = 1) -> pd.DataFrame:
    """Of an arm's runs, the best of each seed: by utility at the level or, if none reaches it, by
    progress.

    Args:
        runs: see :func:`run_table`.
        sign: 1 if more utility is better, −1 if less.
    """
    rank = (sign * runs["reached"]).fillna(runs["deepest"])
    ranked = runs.assign(reaches=runs["reached"].notna(), rank=rank).sort_values(
        ["reaches", "rank"], ascending=False, kind="stable"
    )
    return ranked.drop_duplicates("seed").set_index("seed").sort_index()


def summarise(
    rows: Sequence[Row], by: Compared, own_rates: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Every arm at equal forgetting, in the order in which arms first appear.

    Args:
        rows, by: see the head of this module.
        own_rates: masks that have learning rates of their own.

    Returns:
        Dicts with ``objective``, ``mask``, ``score``, ``density``; ``mean``, ``std`` and ``n`` of
        utility at equal forgetting over the seeds that reach it, and ``values``, seed -> utility;
        ``reached``, the share of runs that do, of ``runs``; ``diverged``, how many runs did;
        ``seeds``, how many are finished; ``learning_rates``, seed -> chosen; ``steps``, the mean
        number of steps to the level; ``difference`` from dense over the seeds of both, its ``p`` or
        ``why`` there is none, ``pairs``, ``verdict``; ``equal_steps``, see :func:`_equal_steps`;
        ``area``, see :func:`_area`; ``curve``, (forget measure, mean utility over seeds) from the
        target to where the shallowest of the chosen runs ends; the means of :data:`AT_END`;
        ``own_learning_rates``, whether the mask is one of ``own_rates``.
    """
    runs = run_table(rows, by)
    arms = dict(iter(runs.groupby(["objective", "mask"], sort=False)))
    best = {arm: chosen(own, by.utility_sign) for arm, own in arms.items()}
    dense_runs = runs[runs["score"].isna() & (runs["density"] == 1.0)]
    dense_of = {run.objective: (run.objective, run.mask) for run in dense_runs.itertuples()}
    found = []
    for arm, own in arms.items():
        dense = dense_of.get(arm[0])
        mine, theirs = best[arm], best.get(dense)
        entry = {name: _plain(own[name].iloc[-1]) for name in LABELS}
        entry |= _at_level(own, mine) | _against(mine, theirs if arm != dense else None, by)
        if dense is None:
            entry["verdict"] = "no dense run to compare with"
        compared = dense not in (None, arm)
        entry["equal_steps"] = _equal_steps(own, arms[dense]) if compared else None
        entry["curve"] = _mean_curve(mine, by)
        entry["area"] = _area(mine, theirs, by)
        entry |= {name: _plain(mine[name].mean()) for name in AT_END}
        found.append({**entry, "own_learning_rates": arm[1] in own_rates})
    return found


def compared_at(found: Mapping[str, Any], rows: Sequence[Row], level: float) -> dict[str, Any]:
    """What a study found, compared at another level of forgetting.

    Args:
        found: content of its ``study.json``.
        rows: of its table.
        level: value of the forget measure.

    Raises:
        WagleError: if the study has not compared anything yet, the target is past that level, or
            runs ended before it.
    """
    if not found.get("headline"):
        raise WagleError("it has not compared its arms yet, at its own level or --forget_level")
    signs = found["forget_sign"], found["utility_sign"]
    by = Compared(found["forget"], found["utility"], found["target"], level, *signs)
    ends = (found["settings"].get("ends_at") or {}).get(by.forget)
    if by.nothing_to_unlearn or (ends is not None and by.end > by.forget_sign * ends):
        course = f"from {by.target[by.forget]:.4g}, the target's"
        course += "" if ends is None else f", to {ends:.4g}"
        raise WagleError(
            f"--forget_level {level:g} is outside of its runs, where {by.forget} goes {course}"
        )
    own = {arm["mask"] for arm in found["headline"] if arm.get("own_learning_rates")}
    compared = {"forget_level": level, "level_of": "option", "nothing_to_unlearn": False}
    return {**found, **compared, "headline": summarise(rows, by, own)}


def _plain(value: Any) -> Any:
    """A value of a frame as it goes into JSON; None for what is missing."""
    return None if pd.isna(value) else value.item() if isinstance(value, np.generic) else value


def _at_level(runs: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    """Utility at the level over seeds, and how many runs and seeds get there."""
    reached = best["reached"].dropna()
    return {
        **spread(reached)._asdict(),
        "values": {str(seed): value for seed, value in reached.items()},
        "runs": len(runs),
        "reached": float(runs["reached"].notna().mean()),
        "diverged": int(runs["diverged"].sum()),
        "seeds": len(best),
        "learning_rates": {str(seed): lr for seed, lr in best["lr"].items()},
        "steps": _plain(best["steps"].mean()),
    }


def _against(best: pd.DataFrame, dense: Optional[pd.DataFrame], by: Compared) -> dict[str, Any]:
    """The paired comparison with dense of the same objective; empty fields without one."""
    if dense is None:
        return {"difference": None, "p": None, "why": "", "pairs": 0, "verdict": ""}
    ours, theirs = (of["reached"].dropna() for of in (best, dense))
    both = ours.index.intersection(theirs.index)
    test = paired(ours[both], theirs[both])
    samples = spread(ours), spread(theirs)
    return {
        "difference": test.difference,
        "p": test.p,
        "why": test.why,
        "pairs": test.n,
        "verdict": verdict(test, by.utility_sign, *samples, len(best), len(dense)),
    }


def _equal_steps(runs: pd.DataFrame, dense: pd.DataFrame) -> Optional[dict[str, Any]]:
    """The paired comparison where both reach the level in the same number of steps.

    Returns:
        ``difference``, ``p``, ``n`` and mean ``steps`` over the seeds whose runs allow it, see
        :func:`~wagle_pl.study.curves.at_equal_steps`; None if none does.
    """

    def paces(of: pd.DataFrame) -> dict[int, list[Pace]]:
        """Seed -> its runs that reach the level."""
        there = of.dropna(subset="reached")
        return {
            seed: [Pace(*run) for run in own[["lr", "steps", "reached"]].itertuples(index=False)]
            for seed, own in there.groupby("seed")
        }

    ours, theirs = paces(runs), paces(dense)
    found = [at_equal_steps(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    both = [each for each in found if each is not None]
    if not both:
        return None
    steps, mine, other = zip(*both, strict=True)
    test = paired(mine, other)
    return {"difference": test.difference, "p": test.p, "n": test.n, "steps": spread(steps).mean}


def _mean_curve(best: pd.DataFrame, by: Compared) -> list[tuple[float, float]]:
    levels = np.linspace(by.start, best["deepest"].min(), CURVE_POINTS)
    curves = [np.interp(levels, *np.transpose(envelope(points))) for points in best["points"]]
    return list(
        zip((by.forget_sign * levels).tolist(), np.mean(curves, axis=0).tolist(), strict=True)
    )


def _area(best: pd.DataFrame, dense: Optional[pd.DataFrame], by: Compared) -> dict[str, Any]:
    """Area under the curves of the chosen runs, over the range that arm and dense have in common.

    For each seed: from the target's forget measure to the level, or to where the shallower of the
    two ends.

    Returns:
        ``mean``, ``std`` and ``n`` of the area (divided by the width of its range: a mean utility)
        over seeds; ``dense``, the mean of dense over the same ranges; ``difference`` and ``p``,
        None for dense itself; ``to``, the mean end of the ranges, as a value of the forget measure.
    """
    beside = best if dense is None else dense
    areas = []
    for seed in best.index.intersection(beside.index):
        ours, theirs = best.loc[seed], beside.loc[seed]
        end = min(by.end, ours["deepest"], theirs["deepest"])
        pair = [mean_utility(run["points"], by.start, end) for run in (ours, theirs)]
        if None not in pair:
            areas.append((*pair, by.forget_sign * end))
    mine, other, ends = zip(*areas, strict=True) if areas else ((), (), ())
    test = paired(mine, other) if dense is not None and dense is not best else None
    return {
        **spread(mine)._asdict(),
        "dense": spread(other).mean if dense is not None else None,
        "difference": test.difference if test else None,
        "p": test.p if test else None,
        "to": spread(ends).mean,
    }
