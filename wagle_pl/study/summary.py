"""What a study found: rows of its table -> every arm at equal forgetting, beside dense, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.study.curves import (
    Pace,
    at_equal_steps,
    deepest,
    mean_utility,
    paired,
    sample,
    utility_at,
    verdict,
)

Row = Mapping[str, Any]

#: What is shown of the ends of runs, where a suite has it: TOFU's model utility, and the averages of WAGLE's tables.
AT_END = ("model_utility", "ue_average", "ut_average")


class Compared(NamedTuple):
    """What arms are compared by.

    Attributes:
        forget: forget measure.
        utility: utility measure.
        target: measures of the target model; every curve starts there.
        level: value of the forget measure at which utilities are compared.
        forget_sign: −1 if the forget measure falls as a model forgets, 1 if it rises.
        utility_sign: 1 if more utility is better, −1 if less (a perplexity).
    """

    forget: str
    utility: str
    target: Mapping[str, float]
    level: float
    forget_sign: int = -1
    utility_sign: int = 1

    @property
    def nothing_to_unlearn(self) -> bool:
        """Whether the target is at the level, or past it, already."""
        return self.forget_sign * self.target[self.forget] >= self.forget_sign * self.level


@dataclass
class Curve:
    """One run.

    Attributes:
        lr, seed: of the run.
        points: (progress, utility) of the target model and of each test, in the order of steps.
        reached: utility at the level; None if the run never reaches it.
        steps: after how many steps it does, piecewise linear between tests; None if it never does.
        last: the row of its last test; empty if it had none.
        diverged: whether its loss became NaN.
    """

    lr: float
    seed: int
    points: list[tuple[float, float]]
    reached: Optional[float]
    steps: Optional[float]
    last: Row = field(default_factory=dict)
    diverged: bool = False


Arm = tuple[str, str]  # objective, mask


def curves(rows: Iterable[Row], by: Compared) -> dict[Arm, list[Curve]]:
    """The runs of each arm.

    Args:
        rows: of the study's table.
        by: what is compared.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    found: dict[Arm, list[Curve]] = {}
    start = (by.forget_sign * by.target[by.forget], by.target[by.utility])
    for parts in runs.values():
        parts.sort(key=lambda row: row["step"])
        tested = [
            row for row in parts if row.get("forget") is not None and row.get("utility") is not None
        ]
        points = [start, *((by.forget_sign * row["forget"], row["utility"]) for row in tested)]
        pace = [
            (start[0], 0.0),
            *((by.forget_sign * row["forget"], float(row["step"])) for row in tested),
        ]
        reached, steps = (utility_at(path, by.forget_sign * by.level) for path in (points, pace))
        curve = Curve(parts[0]["lr"], parts[0]["seed"], points, reached, steps)
        curve.last = tested[-1] if tested else {}
        curve.diverged = any(str(row.get("note") or "").startswith("diverged") for row in parts)
        found.setdefault((parts[0]["objective"], parts[0]["mask"]), []).append(curve)
    return found


def chosen(runs: Sequence[Curve], sign: int = 1) -> dict[int, Curve]:
    """For each seed, the best run over learning rates: by utility at the level; if none reaches it, the one that comes
    nearest.

    Args:
        runs: of one arm.
        sign: 1 if more utility is better, −1 if less.
    """
    best: dict[int, Curve] = {}
    for run in runs:
        if run.seed not in best or _rank(run, sign) > _rank(best[run.seed], sign):
            best[run.seed] = run
    return dict(sorted(best.items()))


def _rank(run: Curve, sign: int) -> tuple[bool, float]:
    return (True, sign * run.reached) if run.reached is not None else (False, deepest(run.points))


def summarise(rows: Sequence[Row], by: Compared) -> list[dict[str, Any]]:
    """Every arm at equal forgetting, one plain dict an arm, in the order in which arms first appear.

    Args:
        rows: of the study's table.
        by: what is compared.

    Returns:
        Dicts with ``objective``, ``mask``, ``score``, ``density``; ``mean``, ``std`` and ``n`` of utility at equal
        forgetting over the seeds that reach it, and ``values``, seed -> utility; ``reached``, the share of runs that
        do, of ``runs``; ``seeds``, how many are finished; ``learning_rates``, seed -> chosen; ``steps``, the mean
        number of steps to the level; ``difference`` from dense over the seeds of both, its ``p`` or ``why`` there is
        none, ``verdict``; ``equal_steps``, see :func:`_equal_steps`; ``area``, see :func:`_area`; ``curve``, see
        :func:`_mean_curve`; the means of :data:`AT_END` over the chosen runs.
    """
    arms = curves(rows, by)
    dense_of = {
        row["objective"]: row["mask"]
        for row in rows
        if row.get("score") is None and row.get("density") == 1.0
    }
    labels = {(row["objective"], row["mask"]): row for row in rows}
    best = {arm: chosen(runs, by.utility_sign) for arm, runs in arms.items()}
    found = []
    for arm, runs in arms.items():
        dense = (arm[0], dense_of.get(arm[0], ""))
        entry: dict[str, Any] = {"objective": arm[0], "mask": arm[1]}
        entry |= {name: labels[arm].get(name) for name in ("score", "density")}
        entry |= _at_level(best[arm], runs)
        if dense in arms and arm != dense:
            entry |= _against(best[arm], best[dense], by)
        else:
            entry |= {"difference": None, "p": None, "why": "", "pairs": 0, "verdict": ""}
            if arm != dense:
                entry["verdict"] = "no dense run to compare with"
        entry["equal_steps"] = (
            _equal_steps(runs, arms[dense]) if dense in arms and arm != dense else None
        )
        entry["curve"] = _mean_curve(list(best[arm].values()), by)
        entry["area"] = _area(best[arm], best.get(dense, {}), by)
        for name in AT_END:
            numbers = [
                run.last[name] for run in best[arm].values() if run.last.get(name) is not None
            ]
            entry[name] = sample(numbers).mean
        found.append(entry)
    return found


def marked(arms: Sequence[Mapping[str, Any]], own: Collection[str]) -> list[dict[str, Any]]:
    """The arms, each with ``own_learning_rates``: whether its mask has learning rates of its own.

    Args:
        arms: see :func:`summarise`.
        own: masks that have.
    """
    return [{**arm, "own_learning_rates": arm["mask"] in own} for arm in arms]


def compared_at(found: Mapping[str, Any], rows: Sequence[Row], level: float) -> dict[str, Any]:
    """What a study found, compared at another level of forgetting.

    Args:
        found: content of its ``study.json``.
        rows: of its table.
        level: value of the forget measure.

    Raises:
        WagleError: if the study has not compared anything yet, the target is past that level, or runs ended before it.
    """
    if not found.get("headline"):
        raise WagleError("it has not compared its arms yet, at its own level or --forget_level")
    signs = found["forget_sign"], found["utility_sign"]
    by = Compared(found["forget"], found["utility"], found["target"], level, *signs)
    ends = (found["settings"].get("ends_at") or {}).get(by.forget)
    if by.nothing_to_unlearn or (ends is not None and by.forget_sign * (level - ends) > 0):
        course = f"from {by.target[by.forget]:.4g}, the target's" + (
            f", to {ends:.4g}" if ends is not None else ""
        )
        raise WagleError(
            f"--forget_level {level:g} is outside of its runs, where {by.forget} goes {course}"
        )
    own = {arm["mask"] for arm in found["headline"] if arm.get("own_learning_rates")}
    arms = marked(summarise(rows, by), own)
    return {
        **found,
        "headline": arms,
        "forget_level": level,
        "level_of": "option",
        "nothing_to_unlearn": False,
    }


def _reached(best: Mapping[int, Curve]) -> dict[int, float]:
    return {seed: run.reached for seed, run in best.items() if run.reached is not None}


def _at_level(best: Mapping[int, Curve], runs: Sequence[Curve]) -> dict[str, Any]:
    values = _reached(best)
    return {
        **sample(list(values.values()))._asdict(),
        "values": {str(seed): value for seed, value in values.items()},
        "runs": len(runs),
        "reached": sum(run.reached is not None for run in runs) / len(runs),
        "diverged": sum(run.diverged for run in runs),
        "seeds": len(best),
        "learning_rates": {str(seed): run.lr for seed, run in best.items()},
        "steps": sample([run.steps for run in best.values() if run.steps is not None]).mean,
    }


def _against(arm: Mapping[int, Curve], dense: Mapping[int, Curve], by: Compared) -> dict[str, Any]:
    """The paired comparison with dense of the same objective."""
    ours, theirs = _reached(arm), _reached(dense)
    both = sorted(set(ours) & set(theirs))
    test = paired([ours[seed] for seed in both], [theirs[seed] for seed in both])
    samples = (sample(list(ours.values())), sample(list(theirs.values())))
    word = verdict(test, by.utility_sign, *samples, len(arm), len(dense))
    return {
        "difference": test.difference,
        "p": test.p,
        "why": test.why,
        "pairs": test.n,
        "verdict": word,
    }


def _equal_steps(runs: Sequence[Curve], dense: Sequence[Curve]) -> Optional[dict[str, Any]]:
    """The paired comparison with dense where both come to the level in the same number of steps, over the seeds whose
    runs allow it (:func:`~wagle_pl.study.curves.at_equal_steps`): ``difference``, ``p``, ``n`` seeds, mean ``steps``.
    """
    seeds = sorted({run.seed for run in runs} & {run.seed for run in dense})
    found = [at_equal_steps(_paces(runs, seed), _paces(dense, seed)) for seed in seeds]
    both = [each for each in found if each is not None]
    if not both:
        return None
    steps, ours, theirs = zip(*both, strict=True)
    test = paired(ours, theirs)
    return {
        "difference": test.difference,
        "p": test.p,
        "n": test.n,
        "steps": statistics.fmean(steps),
    }


def _paces(runs: Sequence[Curve], seed: int) -> list[Pace]:
    return [
        Pace(run.lr, run.steps, run.reached)
        for run in runs
        if run.seed == seed and run.reached is not None
    ]


def _mean_curve(runs: Sequence[Curve], by: Compared, count: int = 33) -> list[tuple[float, float]]:
    """(forget measure, mean utility over seeds) at evenly spaced levels, from the target to where the shallowest of the
    runs ends.
    """
    start, end = runs[0].points[0][0], min(deepest(run.points) for run in runs)
    levels = [start + (end - start) * i / (count - 1) for i in range(count)]
    levels[-1] = end  # not beyond it by a rounding
    found = ([utility_at(run.points, level) for run in runs] for level in levels)
    return [
        (by.forget_sign * level, statistics.fmean(values))
        for level, values in zip(levels, found, strict=True)
    ]


def _area(arm: Mapping[int, Curve], dense: Mapping[int, Curve], by: Compared) -> dict[str, Any]:
    """Area under the forget–utility curve of the chosen runs, over the range that arm and dense have in common.

    For each seed: from the target's forget measure to the level, or to where the shallower of the two ends.

    Returns:
        ``mean``, ``std`` and ``n`` of the area (divided by the width of its range: a mean utility) over seeds;
        ``dense``, the mean of dense over the same ranges; ``difference`` and ``p``, None for dense itself; ``to``, the
        mean end of the ranges, as a value of the forget measure.
    """
    start, level = by.forget_sign * by.target[by.forget], by.forget_sign * by.level
    ours, theirs, ends = [], [], []
    for seed, run in arm.items():
        other = dense.get(seed, run) if dense else run
        if dense and seed not in dense:
            continue
        end = min(level, deepest(run.points), deepest(other.points))
        pair = mean_utility(run.points, start, end), mean_utility(other.points, start, end)
        if None not in pair:
            ours.append(pair[0])
            theirs.append(pair[1])
            ends.append(by.forget_sign * end)
    test = paired(ours, theirs) if dense and dense is not arm else None
    found = sample(ours)
    return {
        **found._asdict(),
        "dense": sample(theirs).mean if dense else None,
        "difference": test.difference if test else None,
        "p": test.p if test else None,
        "to": sample(ends).mean,
    }
