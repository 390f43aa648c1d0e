"""Forget–utility curves: utility at equal forgetting, areas, and tests of an arm against dense.

A run that is tested along its way is a *curve*: points (x, u) in the order of its steps, the target
model first. u is the utility. x is *progress*: the forget measure, with its sign chosen so that x
grows as the model forgets. A *level* is a value of x. Between two points the utility is
interpolated linearly; beyond the last it is unknown and never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

Points = Sequence[tuple[float, float]]

MIN_PAIRS = 3  # for a paired t-test
SIGNIFICANT = 0.05


def envelope(points: Points) -> list[tuple[float, float]]:
    """The monotone envelope: the points at which the run has forgotten more than ever before.

    A run may remember again for a while. Without those points, every level is reached once: between
    the last record below it and the first record above it.

    >>> envelope([(0.0, 1.0), (0.5, 0.8), (0.4, 0.9), (0.7, 0.6)])
    [(0.0, 1.0), (0.5, 0.8), (0.7, 0.6)]
    """
    before = np.maximum.accumulate([-math.inf, *(x for x, _ in points)])
    return [(x, u) for (x, u), record in zip(points, before, strict=False) if x > record]


def utility_at(points: Points, level: float) -> Optional[float]:
    """Utility where the envelope first reaches a level; None if it never does.

    A level that the first point has passed already has the first point's utility.

    >>> round(utility_at([(0.0, 1.0), (0.5, 0.8), (1.0, 0.4)], 0.75), 9)
    0.6
    >>> utility_at([(0.0, 1.0), (0.5, 0.8)], 0.75) is None
    True
    """
    x, u = np.transpose(envelope(points))
    return float(np.interp(level, x, u)) if level <= x[-1] else None


def mean_utility(points: Points, low: float, high: float) -> Optional[float]:
    """Area under the envelope between two levels, divided by their distance: a mean utility.

    None if the curve does not cover the range, or the range is empty.

    >>> mean_utility([(0.0, 1.0), (1.0, 0.0)], 0.0, 0.5)
    0.75
    """
    from scipy.integrate import trapezoid

    x, u = np.transpose(envelope(points))
    if not x[0] <= low < high <= x[-1]:
        return None
    knots = np.array([low, *x[(low < x) & (x < high)], high])
    return float(trapezoid(np.interp(knots, x, u), knots)) / (high - low)


class Pace(NamedTuple):
    """How fast a run reaches the level: its learning rate, the steps it took, its utility there."""

    lr: float
    steps: float
    utility: float


def over_rates(runs: Sequence[Pace]) -> list[tuple[float, float]]:
    """(steps, utility) of an arm's runs from the fastest learning rate to the slowest.

    Faster learning rates take fewer steps, until they overshoot: they keep far less and save
    nothing. A run that took no fewer steps than one with a slower learning rate is therefore left
    out, and the steps grow all the way.

    >>> over_rates([Pace(4e-3, 53.1, 0.64), Pace(5.6e-3, 53.8, 0.46), Pace(2.8e-3, 67.4, 0.72)])
    [(53.1, 0.64), (67.4, 0.72)]
    """
    fewer = envelope([(-run.steps, run.utility) for run in sorted(runs)])
    return [(-steps, utility) for steps, utility in reversed(fewer)]


def at_equal_steps(
    arm: Sequence[Pace], dense: Sequence[Pace]
) -> Optional[tuple[float, float, float]]:
    """Utilities of two arms whose runs reach the level in the same number of steps.

    Slower runs tend to keep more, whatever the mask, so the best runs of two arms differ by their
    speed too. Here both are interpolated over their learning rates (:func:`over_rates`) at the
    largest number of steps that runs of both lie around.

    Args:
        arm: its runs of one seed, those that reach the level.
        dense: likewise of dense.

    Returns:
        The number of steps, the arm's utility, dense's; None if there is no such number.

    >>> dense = [Pace(2, 10.0, 0.4), Pace(1, 40.0, 0.6)]
    >>> at_equal_steps([Pace(2, 20.0, 0.5), Pace(1, 60.0, 0.9)], dense)
    (40.0, 0.7, 0.6)
    """
    if not arm or not dense:
        return None
    ours, theirs = over_rates(arm), over_rates(dense)
    steps = min(ours[-1][0], theirs[-1][0])
    if steps < max(ours[0][0], theirs[0][0]):
        return None
    return steps, utility_at(ours, steps), utility_at(theirs, steps)


class Spread(NamedTuple):
    """Numbers over seeds; the mean of none and the deviation of fewer than two are None."""

    mean: Optional[float]
    std: Optional[float]
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n − 1 in the denominator) over seeds.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, std=1.4142135623730951, n=2)
    """
    n = len(values)
    mean = float(np.mean(values)) if n else None
    return Spread(mean, float(np.std(values, ddof=1)) if n > 1 else None, n)


class Paired(NamedTuple):
    """A paired comparison of an arm with dense."""

    difference: Optional[float]  # mean of arm − dense over the pairs; None without pairs
    p: Optional[float]  # two-sided, of the paired t-test; None where there is none
    why: str  # why there is no p-value; empty if there is one
    n: int  # number of pairs


def paired(arm: Sequence[float], dense: Sequence[float]) -> Paired:
    """Paired t-test (scipy's ``ttest_rel``) of numbers of the same seeds in the same order.

    >>> paired([0.75, 0.5], [0.5, 0.5])
    Paired(difference=0.125, p=None, why='n too small', n=2)
    """
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
    """What an arm does against dense, in a word or a few.

    Nothing is won or lost with fewer than three pairs. With them a difference is a tie within the
    larger of the two standard deviations over seeds, and if the paired test's p is 0.05 or more.

    Args:
        test: the paired comparison.
        sign: 1 if more utility is better, −1 if less.
        arm, dense: their utilities at equal forgetting.
        arm_seeds, dense_seeds: how many of their seeds are finished.

    >>> verdict(Paired(0.05, 0.01, "", 3), 1, Spread(0.9, 0.01, 3), Spread(0.85, 0.02, 3), 3, 3)
    'wins'
    """
    if not arm_seeds:
        return "not run yet"
    if not arm.n:
        return "never reaches it"
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
        return "ties"
    return "wins" if gain > 0 else "loses"
