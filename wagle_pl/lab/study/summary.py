"""What a study found: every arm (an objective with a mask) compared with dense at equal forgetting.

A run with tests along the way is a *curve*: points (x, u) in the order of its steps, the target
model first. u is the utility. x is *progress*: the forget measure, with its sign chosen so that x
grows as the model forgets. A *level* is a value of x. Between two points the utility is
interpolated linearly; beyond the last it is unknown and never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict

import numpy as np
import pandas as pd

from wagle_pl.core.errors import WagleError
from wagle_pl.core.schema import Count, check
from wagle_pl.evaluation.results import load_table

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]
Arm = tuple[str, str]  # names of an objective and of a mask

#: Measures at the ends of runs, where a suite has them: TOFU's and those of WAGLE's tables.
AT_END = ("model_utility", "ue_average", "ut_average")

#: First columns of a study's table; measures follow.
COLUMNS: dict[str, Any] = {
    **{"objective": str, "mask": str, "score": Optional[str], "density": Optional[float]},
    **{"lr": float, "seed": int, "step": Count, "run": str, "forget": Optional[float]},
    **{"utility": Optional[float], "seconds": float, "note": Optional[str]},
    **{"objective_id": str, "mask_id": str},
}


def load_runs(path: Path, columns: Mapping[str, Any] = COLUMNS) -> list[dict[str, Any]]:
    """The rows of a table: some columns of these types, others of measures."""
    rows = load_table(path)
    kinds = {**dict.fromkeys(rows[0] if rows else (), Optional[float]), **columns}
    return check(rows, list[TypedDict("Run", kinds)], str(path))  # type: ignore[misc, operator]


# The schema of ``study.json``, as far as a report reads it.


class _Finished(TypedDict):
    finished: Count
    planned: Count


class _Settings(TypedDict):
    ends_at: Optional[dict[str, float]]


_NUMBER: Any = Optional[float]
_BY_SEED: Any = Optional[dict[str, float]]
_CURVE: Any = Optional[list[tuple[float, float]]]
_EQUAL: dict[str, Any] = {"difference": _NUMBER, "p": _NUMBER, "values": _BY_SEED}
_BOTH: dict[str, Any] = dict.fromkeys(("objective", "mask", "verdict", "why"), str)
_BOTH |= dict.fromkeys(("mean", "std", "difference", "p"), _NUMBER)
_BOTH |= {"n": Count, "seeds": Count, "values": _BY_SEED, "curve": _CURVE}
_ARM = {**_BOTH, **dict.fromkeys(("steps", *AT_END), _NUMBER), "reached": float}
_ARM |= {"area": TypedDict("Area", {"mean": _NUMBER, "dense": _NUMBER})}  # type: ignore[operator]
_ARM |= {"equal_steps": Optional[TypedDict("Equal", _EQUAL)]}  # type: ignore[misc, operator]
_ARM |= {"learning_rates": _BY_SEED, "runs": Optional[Count], "diverged": Optional[Count]}
_END = {**_BOTH, "measure": str, "what": str, "target": _NUMBER, "retrained": _NUMBER}
_END |= {"values": dict[str, float], "retrained_curve": _CURVE}
_SUMMARY: dict[str, Any] = {"forget": str, "utility": str, "forget_level": _NUMBER}
_SUMMARY |= dict.fromkeys(("forget_sign", "utility_sign"), Optional[Literal[1, -1]])
_SUMMARY |= dict.fromkeys(("target", "retrained"), Optional[dict[str, _NUMBER]])
_SUMMARY |= {"runs": Optional[_Finished], "settings": Optional[_Settings]}
_SUMMARY |= {"headline": Optional[list[TypedDict("Arm", _ARM)]]}  # type: ignore[misc, operator]
_SUMMARY |= {"ends": Optional[list[TypedDict("End", _END)]]}  # type: ignore[misc, operator]
SUMMARY = TypedDict("SUMMARY", _SUMMARY)  # type: ignore[misc]

LABELS = ("objective", "mask", "score", "density")
CURVE_POINTS = 33  # of an arm's mean curve
MIN_PAIRS = 3  # for a paired t-test
#: Said of an arm: too small a difference for so few seeds, which does not prove equality.
UNRESOLVED = "not resolved"
NEVER = "never reaches it"  # said of an arm: "it" is the level
SIGNIFICANT = 0.05


# -- curves ----------------------------------------------------------------------------------------


def envelope(points: Points) -> list[tuple[float, float]]:
    """The monotone envelope: the points at which the run has forgotten more than ever before.

    A run may remember again for a while; the envelope reaches every level only once.

    >>> envelope([(0.0, 1.0), (0.5, 0.8), (0.4, 0.9), (0.7, 0.6)])
    [(0.0, 1.0), (0.5, 0.8), (0.7, 0.6)]
    """
    before = np.maximum.accumulate([-math.inf, *(x for x, _ in points)])
    return [(x, u) for (x, u), record in zip(points, before, strict=False) if x > record]


def utility_at(points: Points, level: float) -> Optional[float]:
    """Utility where the envelope first is at a level or past it; None if it never gets there."""
    x, u = np.transpose(envelope(points))
    return float(np.interp(level, x, u)) if level <= x[-1] else None


def mean_utility(points: Points, low: float, high: float) -> Optional[float]:
    """Area under the envelope between two levels, divided by their distance; None if the curve does
    not cover the range, or the range is empty."""
    from scipy.integrate import trapezoid

    x, u = np.transpose(envelope(points))
    if not x[0] <= low < high <= x[-1]:
        return None
    knots = np.array([low, *x[(low < x) & (x < high)], high])
    return float(trapezoid(np.interp(knots, x, u), knots)) / (high - low)


class Pace(NamedTuple):
    """How fast a run reaches the level, and what it keeps."""

    lr: float
    steps: float
    utility: float  # at the level


def at_equal_steps(
    arm: Sequence[Pace], dense: Sequence[Pace]
) -> Optional[tuple[float, float, float]]:
    """Steps, and the utilities of two arms whose runs of one seed reach the level in that many.

    Slower runs tend to keep more, whatever the mask, so the best runs of two arms also differ by
    their speed. Here both are interpolated over their learning rates, at the largest number of
    steps within the range of both; None if there is none. A run that took no fewer steps than one
    with a slower rate overshoots, keeps far less and saves nothing: it is left out.
    """
    if not arm or not dense:
        return None

    def by_steps(runs: Sequence[Pace]) -> list[tuple[float, float]]:
        fewer = envelope([(-run.steps, run.utility) for run in sorted(runs)])
        return [(-steps, utility) for steps, utility in reversed(fewer)]

    ours, theirs = by_steps(arm), by_steps(dense)
    steps = min(ours[-1][0], theirs[-1][0])
    if steps < max(ours[0][0], theirs[0][0]):
        return None
    return steps, utility_at(ours, steps), utility_at(theirs, steps)


# -- over seeds ------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean, standard deviation (n − 1 in the denominator) and number of values over seeds."""

    mean: Optional[float]  # None without values
    std: Optional[float]  # None for fewer than two
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of some values."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    return Spread(mean, float(np.std(values, ddof=1)) if n > 1 else None, n)


def decimals(value: Optional[float], digits: int = 3) -> str:
    """A number with ``digits`` decimals; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def mean_std(mean: Optional[float], std: Optional[float], digits: int = 3) -> str:
    """A mean and, if it is of several numbers, their standard deviation.

    >>> mean_std(0.5, 0.01), mean_std(0.5, None), mean_std(None, None)
    ('0.500 ± 0.010', '0.500', '–')
    """
    return decimals(mean, digits) + ("" if std is None else f" ± {std:.{digits}f}")


class Paired(NamedTuple):
    """A paired comparison of an arm with dense."""

    difference: Optional[float]  # mean of arm − dense over the pairs; None without pairs
    p: Optional[float]  # two-sided, of the paired t-test; None where there is none
    why: str  # why there is no p-value; empty if there is one
    n: int  # number of pairs


def paired(arm: Sequence[float], dense: Sequence[float]) -> Paired:
    """Paired t-test (scipy's ``ttest_rel``) of numbers of the same seeds in the same order."""
    from scipy.stats import ttest_rel

    differences = np.subtract(arm, dense)
    n = len(differences)
    if not n:
        return Paired(None, None, "no pairs", 0)
    mean = float(differences.mean())
    if n < MIN_PAIRS:
        return Paired(mean, None, "n too small", n)
    if math.isclose(differences.min(), differences.max(), rel_tol=1e-9, abs_tol=1e-12):
        return Paired(mean, None, "no spread", n)
    return Paired(mean, float(ttest_rel(arm, dense).pvalue), "", n)


def verdict(
    test: Paired, sign: int, arm: Spread, dense: Spread, arm_seeds: int, dense_seeds: int
) -> str:
    """How an arm compares with dense, in a few words.

    With fewer than three pairs nothing is won or lost. Otherwise a difference is not resolved if it
    is within the larger of the two standard deviations over seeds, or if the paired test's p is
    0.05 or more. ``sign`` is −1 if less utility is better; seeds are those finished.
    """
    if not arm_seeds:
        return "not run yet"
    if not arm.n:
        return NEVER
    if arm.n < arm_seeds:
        return f"reaches it in {arm.n} of {arm_seeds} seeds"
    if dense.n < dense_seeds:
        return "dense does not always reach it" if dense.n else "dense never reaches it"
    if test.difference is None:
        return "no seed in common with dense"
    gain = sign * test.difference
    if test.n < MIN_PAIRS:
        seeds = "one seed" if test.n == 1 else f"{test.n} seeds"
        return f"{'ahead' if gain > 0 else 'behind' if gain < 0 else 'level'}, {seeds}"
    within = abs(gain) <= max(arm.std or 0.0, dense.std or 0.0)
    if within or (test.p is not None and test.p >= SIGNIFICANT):
        return UNRESOLVED
    return "wins" if gain > 0 else "loses"


# -- arms ------------------------------------------------------------------------------------------


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
        return self.forget_sign * self.target[self.forget]

    @property
    def end(self) -> float:
        return self.forget_sign * self.level

    @property
    def nothing_to_unlearn(self) -> bool:
        """Whether the target is at the level, or past it, already."""
        return self.start >= self.end


def run_table(rows: Sequence[Row], by: Compared) -> pd.DataFrame:
    """One line per run, from the rows of a study's table, with what its curve says.

    ``points`` are (progress, utility) of the target model and of each test, ``deepest`` is the
    largest progress, ``reached`` the utility at the level, and ``steps`` the number of steps to the
    level; the last two are NaN if the run never gets there.
    """
    tests: dict[str, list[Row]] = {row["run"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["step"]):
        tests[row["run"]].append(row)
    runs = []
    for run in tests.values():
        tested = [r for r in run if None not in (r.get("forget"), r.get("utility"))]
        progress = [by.start, *(by.forget_sign * row["forget"] for row in tested)]
        utilities = [by.target[by.utility], *(row["utility"] for row in tested)]
        steps = [0.0, *(float(row["step"]) for row in tested)]
        points = list(zip(progress, utilities, strict=True))
        last = tested[-1] if tested else {}
        runs.append(
            {
                **{name: run[0].get(name) for name in (*LABELS, "lr", "seed", "run")},
                "points": points,
                "deepest": max(progress),
                "reached": utility_at(points, by.end),
                "steps": utility_at(list(zip(progress, steps, strict=True)), by.end),
                "diverged": any("diverged" in (row.get("note") or "") for row in run),
                **{name: last.get(name) for name in AT_END},
            }
        )
    return pd.DataFrame(runs).astype(dict.fromkeys(("reached", "steps", *AT_END), float))


def chosen(runs: pd.DataFrame, sign: int = 1) -> pd.DataFrame:
    """The best run of each seed of an arm: by utility at the level or, if none gets there, by
    progress; ``sign`` is −1 if less utility is better."""
    rank = (sign * runs["reached"]).fillna(runs["deepest"])
    ranked = runs.assign(reaches=runs["reached"].notna(), rank=rank).sort_values(
        ["reaches", "rank"], ascending=False, kind="stable"
    )
    return ranked.drop_duplicates("seed").set_index("seed").sort_index()


def arms_of(
    rows: Sequence[Row], by: Compared
) -> tuple[dict[Arm, pd.DataFrame], dict[Arm, pd.DataFrame], dict[str, Arm]]:
    """Arm -> its runs, and those of :func:`chosen`; objective -> its arm where all weights move."""
    runs = run_table(rows, by)
    arms = dict(iter(runs.groupby(["objective", "mask"], sort=False)))
    best = {arm: chosen(arm_runs, by.utility_sign) for arm, arm_runs in arms.items()}
    dense = runs[runs["score"].isna() & (runs["density"] == 1.0)]
    return arms, best, {run.objective: (run.objective, run.mask) for run in dense.itertuples()}


def summarise(
    rows: Sequence[Row], by: Compared, own_rates: Collection[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """Every arm at equal forgetting, in the order in which arms first appear: the ``headline``.

    Each has ``objective``, ``mask``, ``score``, ``density``; ``mean``, ``std`` and ``n`` of utility
    at the level over the seeds that reach it, and ``values``, seed -> utility; ``reached``, the
    share of ``runs`` that reach it; ``diverged``, how many diverged; ``seeds``, how many are
    finished; ``learning_rates``, seed -> chosen rate; ``steps``, the mean number to the level;
    ``difference`` from dense over the seeds of both, its ``p`` or ``why`` there is none, ``pairs``,
    ``verdict``; ``equal_steps``; ``area``; ``curve``, (forget measure, mean utility over seeds) from
    the target to where the shallowest of the chosen runs ends; the means of :data:`AT_END`; and
    ``own_learning_rates``, whether objective and mask are one of ``own_rates``.
    """
    arms, best, dense_of = arms_of(rows, by)
    entries = []
    for arm, runs in arms.items():
        mine, dense = best[arm], dense_of.get(arm[0])
        reached = mine["reached"].dropna()
        entry = {
            **{name: _plain(runs[name].iloc[-1]) for name in LABELS},
            **spread(reached)._asdict(),
            "values": {str(seed): value for seed, value in reached.items()},
            "runs": len(runs),
            "reached": float(runs["reached"].notna().mean()),
            "diverged": int(runs["diverged"].sum()),
            "seeds": len(mine),
            "learning_rates": {str(seed): lr for seed, lr in mine["lr"].items()},
            "steps": _plain(mine["steps"].mean()),
            **_against(mine, best[dense] if dense not in (None, arm) else None, by),
        }
        if dense is None:
            entry["verdict"] = "no dense run to compare with"
        entry["equal_steps"] = _equal_steps(runs, arms[dense]) if dense not in (None, arm) else None
        levels = np.linspace(by.start, mine["deepest"].min(), CURVE_POINTS)
        curves = [np.interp(levels, *np.transpose(envelope(points))) for points in mine["points"]]
        measures, means = by.forget_sign * levels, np.mean(curves, axis=0)
        entry["curve"] = list(zip(measures.tolist(), means.tolist(), strict=True))
        entry["area"] = _area(mine, best.get(dense), by)
        entry |= {name: _plain(mine[name].mean()) for name in AT_END}
        entries.append({**entry, "own_learning_rates": arm in own_rates})
    return entries


def compared_at(summary: Mapping[str, Any], rows: Sequence[Row], level: float) -> dict[str, Any]:
    """The content of a ``study.json``, compared at another level that its runs go past."""
    if not all(map(summary.get, ("headline", "forget_sign", "utility_sign", "target", "settings"))):
        raise WagleError("it has not compared its arms yet, at its own level or --forget_level")
    signs = summary["forget_sign"], summary["utility_sign"]
    target = {name: float(value) for name, value in summary["target"].items() if value is not None}
    by = Compared(summary["forget"], summary["utility"], target, level, *signs)
    if not {by.forget, by.utility} <= target.keys():
        raise WagleError(f"its target model has no {by.forget}, or no {by.utility}")
    ends = (summary["settings"].get("ends_at") or {}).get(by.forget)
    if by.nothing_to_unlearn or (ends is not None and by.end > by.forget_sign * ends):
        course = f"from {by.target[by.forget]:.4g}, the target's"
        course += "" if ends is None else f", to {ends:.4g}"
        message = f"--forget_level {level:g} is outside of its runs"
        raise WagleError(f"{message}, where {by.forget} goes {course}")
    arms = [arm for arm in summary["headline"] if arm.get("own_learning_rates")]
    own_rates = {(arm["objective"], arm["mask"]) for arm in arms}
    compared = {"forget_level": level, "level_of": "option", "nothing_to_unlearn": False}
    return {**summary, **compared, "headline": summarise(rows, by, own_rates)}


def _plain(value: Any) -> Any:
    """A value of a data frame in a form for JSON; None if it is missing."""
    return None if pd.isna(value) else value.item() if isinstance(value, np.generic) else value


def _against(best: pd.DataFrame, dense: Optional[pd.DataFrame], by: Compared) -> dict[str, Any]:
    """The paired comparison with dense of the same objective; empty fields without one."""
    if dense is None:
        return {"difference": None, "p": None, "why": "", "pairs": 0, "verdict": ""}
    ours, theirs = (of["reached"].dropna() for of in (best, dense))
    both = ours.index.intersection(theirs.index)
    test = paired(ours[both], theirs[both])
    samples = spread(ours), spread(theirs)
    words = verdict(test, by.utility_sign, *samples, len(best), len(dense))
    numbers = {"difference": test.difference, "p": test.p, "why": test.why}
    return {**numbers, "pairs": test.n, "verdict": words}


def _equal_steps(runs: pd.DataFrame, dense: pd.DataFrame) -> Optional[dict[str, Any]]:
    """``values``, seed -> difference of :func:`at_equal_steps`, their mean ``difference``, ``p``,
    ``n``, and mean ``steps``; None if no seed has one."""
    ours, theirs = (
        {
            seed: [Pace(*run) for run in tried[["lr", "steps", "reached"]].itertuples(index=False)]
            for seed, tried in of.dropna(subset="reached").groupby("seed")
        }
        for of in (runs, dense)
    )
    pairs = {seed: at_equal_steps(ours[seed], theirs[seed]) for seed in ours if seed in theirs}
    both = {seed: pair for seed, pair in pairs.items() if pair is not None}
    if not both:
        return None
    steps, mine, other = zip(*both.values(), strict=True)
    test = paired(mine, other)
    values = {str(seed): pair[1] - pair[2] for seed, pair in both.items()}
    numbers = {"difference": test.difference, "p": test.p, "n": test.n}
    return {"values": values, **numbers, "steps": spread(steps).mean}


def _area(best: pd.DataFrame, dense: Optional[pd.DataFrame], by: Compared) -> dict[str, Any]:
    """Over seeds, :func:`mean_utility` of the range that arm and ``dense`` have in common.

    The range goes from the target's forget measure to the level or, if that comes first, to where
    the shallower of the two ends; ``to`` is the mean of these ends.
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
