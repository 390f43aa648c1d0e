"""Forget–utility curves: utility at equal forgetting, area, and the paired test between two arms.

A run that is tested along its way is a *curve*: points (x, u) in the order of its steps, the target model first. u is
the utility. x is *progress*: the forget measure, with its sign chosen so that x grows as the model forgets. Where a
level of forgetting lies between two points, utility is interpolated linearly; beyond the last it is unknown, and never
extrapolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Optional

Points = Sequence[tuple[float, float]]

FEWEST = 3  # pairs that a paired t-test takes
SIGNIFICANT = 0.05


def envelope(points: Points) -> list[tuple[float, float]]:
    """The monotone envelope: the points at which the run has forgotten more than ever before, in the order of steps.

    A run may remember again for a while. Those points are left out, so every level is reached once: on the way between
    the last point before it and the first point behind it that set a record.

    Args:
        points: (x, u) in the order of steps.

    >>> envelope([(0.0, 1.0), (0.5, 0.8), (0.4, 0.9), (0.7, 0.6)])
    [(0.0, 1.0), (0.5, 0.8), (0.7, 0.6)]
    """
    kept: list[tuple[float, float]] = []
    for x, utility in points:
        if not kept or x > kept[-1][0]:
            kept.append((x, utility))
    return kept


def utility_at(points: Points, level: float) -> Optional[float]:
    """Utility where the envelope first reaches a level of progress, piecewise linear; None if it never does.

    Args:
        points: (x, u) in the order of steps.
        level: of x. At a level that the first point has passed already, utility is the first point's.

    >>> round(utility_at([(0.0, 1.0), (0.5, 0.8), (1.0, 0.4)], 0.75), 9)
    0.6
    >>> utility_at([(0.0, 1.0), (0.5, 0.8)], 0.75) is None
    True
    """
    before: Optional[tuple[float, float]] = None
    for x, utility in envelope(points):
        if x >= level:
            if before is None or x == level:
                return utility
            share = (level - before[0]) / (x - before[0])
            return before[1] + share * (utility - before[1])
        before = (x, utility)
    return None


def deepest(points: Points) -> float:
    """The largest progress of a run."""
    return max(x for x, _ in points)


def mean_utility(points: Points, low: float, high: float) -> Optional[float]:
    """Area under the envelope between two levels of progress, divided by their distance: a utility, averaged over
    forgetting. None if the curve does not cover the range, or the range is empty.

    Args:
        points: (x, u) in the order of steps.
        low: level at which the range begins.
        high: level at which it ends.

    >>> mean_utility([(0.0, 1.0), (1.0, 0.0)], 0.0, 0.5)
    0.75
    """
    curve = envelope(points)
    if not low < high or not curve or curve[0][0] > low or curve[-1][0] < high:
        return None
    inside = [point for point in curve if low < point[0] < high]
    ends = [(x, utility_at(curve, x)) for x in (low, high)]
    path = [ends[0], *inside, ends[1]]
    pieces = pairwise(path)
    return sum((x1 - x0) * (u0 + u1) / 2 for (x0, u0), (x1, u1) in pieces) / (high - low)


class Pace(NamedTuple):
    """How fast a run comes to the level.

    Attributes:
        lr: learning rate.
        steps: to the level.
        utility: there.
    """

    lr: float
    steps: float
    utility: float


def over_rates(runs: Sequence[Pace]) -> list[tuple[float, float]]:
    """(steps, utility) of an arm's runs from the fastest learning rate to the slowest, the steps growing all the way.

    Faster learning rates take fewer steps, until they are so fast that the run overshoots: it keeps far less and saves
    nothing. A run that took no fewer steps than one with a slower learning rate is therefore left out. Between it and
    runs of other learning rates that happen to take about as many steps, a line would lead anywhere.

    >>> over_rates([Pace(4e-3, 53.1, 0.64), Pace(5.6e-3, 53.8, 0.46), Pace(2.8e-3, 67.4, 0.72)])
    [(53.1, 0.64), (67.4, 0.72)]
    """
    kept: list[tuple[float, float]] = []
    for run in sorted(runs):
        if not kept or run.steps < kept[-1][0]:
            kept.append((run.steps, run.utility))
    return kept[::-1]


def at_equal_steps(
    arm: Sequence[Pace], dense: Sequence[Pace]
) -> Optional[tuple[float, float, float]]:
    """Utilities of two arms whose runs come to the level in the same number of steps.

    Slower runs tend to keep more, whatever the mask, so the best runs of two arms differ by their speed too. Here both
    arms are read, piecewise linear over their learning rates (:func:`over_rates`), at the largest number of steps that
    runs of both lie around; None if there is none.

    Args:
        arm: its runs of one seed that get to the level.
        dense: those of dense.

    Returns:
        The number of steps, the arm's utility, dense's.

    >>> at_equal_steps([Pace(2, 20.0, 0.5), Pace(1, 60.0, 0.9)], [Pace(2, 10.0, 0.4), Pace(1, 40.0, 0.6)])
    (40.0, 0.7, 0.6)
    """
    if not arm or not dense:
        return None
    arm, dense = over_rates(arm), over_rates(dense)
    steps = min(arm[-1][0], dense[-1][0])
    if steps < max(arm[0][0], dense[0][0]):
        return None
    return steps, utility_at(arm, steps), utility_at(dense, steps)


class Sample(NamedTuple):
    """Numbers of one arm over seeds.

    Attributes:
        mean: None without numbers.
        std: standard deviation (n − 1 in the denominator); None for fewer than two.
        n: how many.
    """

    mean: Optional[float]
    std: Optional[float]
    n: int


def sample(values: Sequence[float]) -> Sample:
    """Mean and standard deviation over seeds.

    >>> sample([1.0, 3.0])
    Sample(mean=2.0, std=1.4142135623730951, n=2)
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return Sample(statistics.fmean(values) if values else None, std, len(values))


class Paired(NamedTuple):
    """A paired comparison of an arm with dense.

    Attributes:
        difference: mean of arm − dense over the pairs; None without pairs.
        p: two-sided p-value of the paired t-test; None where there is none.
        why: why there is no p-value, in words; empty if there is one.
        n: number of pairs.
    """

    difference: Optional[float]
    p: Optional[float]
    why: str
    n: int


def paired(arm: Sequence[float], dense: Sequence[float]) -> Paired:
    """Paired t-test (scipy's ``ttest_rel``) of numbers of the same seeds.

    Args:
        arm: one number a seed.
        dense: those of dense, the same seeds in the same order.

    >>> paired([0.9, 0.8], [0.8, 0.8])
    Paired(difference=0.04999999999999999, p=None, why='n too small', n=2)
    """
    differences = [a - b for a, b in zip(arm, dense, strict=True)]
    if not differences:
        return Paired(None, None, "no pairs", 0)
    mean = statistics.fmean(differences)
    if len(differences) < FEWEST:
        return Paired(mean, None, "n too small", len(differences))
    if math.isclose(min(differences), max(differences), rel_tol=1e-9, abs_tol=1e-12):
        return Paired(mean, None, "no spread", len(differences))
    from scipy.stats import ttest_rel

    return Paired(mean, float(ttest_rel(arm, dense).pvalue), "", len(differences))


def verdict(
    test: Paired, sign: int, arm: Sample, dense: Sample, arm_runs: int, dense_runs: int
) -> str:
    """What an arm does against dense, in a word or a few.

    Nothing is won or lost with fewer than three pairs. With them a difference is a tie within the larger of the two
    standard deviations over seeds, and if the paired test's p is 0.05 or more.

    Args:
        test: the paired comparison.
        sign: 1 if more utility is better, −1 if less.
        arm: utility at equal forgetting of the arm.
        dense: the same of dense.
        arm_runs: seeds of the arm that are finished.
        dense_runs: seeds of dense that are finished.

    >>> verdict(Paired(0.05, 0.01, "", 3), 1, Sample(0.9, 0.01, 3), Sample(0.85, 0.02, 3), 3, 3)
    'wins'
    >>> verdict(Paired(0.05, None, "n too small", 2), 1, Sample(0.9, 0.01, 2), Sample(0.85, 0.02, 3), 3, 3)
    'reaches it in 2 of 3 seeds'
    """
    if not arm_runs:
        return "not run yet"
    if not arm.n:
        return "never reaches it"
    if arm.n < arm_runs:
        return f"reaches it in {arm.n} of {arm_runs} seeds"
    if dense.n < dense_runs:
        return "dense does not always reach it" if dense.n else "dense never reaches it"
    if test.difference is None:
        return "no seed in common with dense"
    gain = sign * test.difference
    if test.n < FEWEST:
        seeds = "one seed" if test.n == 1 else f"{test.n} seeds"
        return f"{'ahead' if gain > 0 else 'behind' if gain < 0 else 'level'}, {seeds}"
    within = abs(gain) <= max(arm.std or 0.0, dense.std or 0.0)
    if within or (test.p is not None and test.p >= SIGNIFICANT):
        return "ties"
    return "wins" if gain > 0 else "loses"
