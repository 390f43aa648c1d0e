"""``configs/people/theory.md``: which set has the least trade-off, and what the published study measured."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr, ttest_rel

PEOPLE = Path(__file__).parents[2] / "configs/people"


@pytest.mark.parametrize("seed", range(20))
def test_the_best_set_is_a_threshold_on_the_ratio(seed: int) -> None:
    """Of all subsets of nine weights."""
    draw = np.random.default_rng(seed)
    gradient, h = np.abs(draw.normal(size=9)), draw.gamma(0.5, size=9) + 1e-3
    subsets = [list(s) for n in range(1, 10) for s in combinations(range(9), n)]
    best = min(subsets, key=lambda s: h[s].sum() / gradient[s].sum() ** 2)
    ratio = gradient / h
    others = np.setdiff1d(range(9), best)
    assert ratio[best].min() > ratio[others].max(initial=0.0)


@pytest.mark.parametrize("seed", range(20))
def test_at_a_fixed_density_the_threshold_is_on_a_difference(seed: int) -> None:
    """The k largest |g| / (h + δ) have the largest G − τH and, of sets with as large a G, the smallest H."""
    draw = np.random.default_rng(seed)
    gradient, h = np.abs(draw.normal(size=9)), draw.gamma(0.5, size=9) + 1e-3
    damping, k = 0.1 * h.mean(), int(draw.integers(1, 9))
    ratio = gradient / (h + damping)
    top = sorted(np.argsort(-ratio)[:k])
    tau = np.sort(ratio)[-k]
    subsets = [list(s) for s in combinations(range(9), k)]
    assert max(subsets, key=lambda s: gradient[s].sum() - tau * h[s].sum()) == top
    as_far = [s for s in subsets if gradient[s].sum() >= gradient[top].sum()]
    assert min(as_far, key=lambda s: h[s].sum()) == top


def test_the_ratio_is_not_the_best_set_of_a_fixed_size() -> None:
    gradient, h = np.array([1, 0.1, 0.9]), np.array([1, 0.01, 0.95])
    trade_off = {
        s: h[list(s)].sum() / gradient[list(s)].sum() ** 2 for s in combinations(range(3), 2)
    }
    assert tuple(sorted(np.argsort(-gradient / h)[:2])) == (0, 1)
    assert round(trade_off[0, 1], 2) == 0.83 and round(trade_off[0, 2], 2) == 0.54


def kept(runs: pd.DataFrame, level: float, steps: float) -> float:
    """Utility where forget probability is at a level in so many steps; mean over seeds."""
    utilities = []
    for _, of_seed in runs.groupby("seed"):
        crossings = []
        for _, run in of_seed.sort_values("step").groupby("lr"):
            below = np.flatnonzero(run.forget <= level)
            if len(below):
                last = below[0] + 1
                # the target model, before the first step
                forget = [0.92, *run.forget[:last]][-2:]
                share = (forget[0] - level) / (forget[0] - forget[1])
                step, utility = [0, *run.step[:last]][-2:], [0.919, *run.utility[:last]][-2:]
                crossings.append([a + share * (b - a) for a, b in (step, utility)])
        at, utility = np.array(sorted(crossings)).reshape(-1, 2).T
        if len(at) and at[0] <= steps <= at[-1]:
            utilities.append(np.interp(steps, at, utility))
    return float(np.mean(utilities)) if utilities else np.nan


def test_the_page_says_what_was_measured() -> None:
    table = pd.read_parquet(PEOPLE / "results/study_full.parquet").dropna(subset="utility")
    found = pd.read_csv(PEOPLE / "results/trade_off.csv")
    page = (PEOPLE / "theory.md").read_text(encoding="utf-8")
    for objective in ("NPO", "GradDiff"):
        runs = table[table.objective == objective]
        measured = [kept(runs[runs["mask"] == name], 0.2, 25) for name in found["mask"]]
        assert np.allclose(measured, found[objective], atol=1e-6, equal_nan=True)
        rank = spearmanr(found.trade_off, measured, nan_policy="omit")
        assert round(rank.statistic, 2) == -0.80 and rank.pvalue < 1e-3
        others = ~found["mask"].str.startswith("curvature")
        rank = spearmanr(found.trade_off[others], found[objective][others], nan_policy="omit")
        assert round(rank.statistic, 2) == -0.60 and round(rank.pvalue, 3) == 0.017
        rank = spearmanr(found.damage / found.gain, found[objective], nan_policy="omit")
        assert round(rank.statistic, 2) == -0.91
    header, *lines = (PEOPLE / "results/trade_off_fresh.csv").read_text().splitlines()
    assert len(lines) == 9
    for line in lines:
        assert line.count(",") == header.count(",")
        assert f"| {line.replace(',', ' | ')} |" in page
    for row in found.itertuples():
        name = row.mask.replace("gamma=1e-06", "γ=1e-6")
        kept_by = ["–" if np.isnan(v) else f"{v:.3f}" for v in (row.NPO, row.GradDiff)]
        cells = [name, *(f"{v:.2f}" for v in (row.gain, row.damage, row.trade_off)), *kept_by]
        assert f"| {' | '.join(cells)} |" in page


def test_the_controls_of_the_page() -> None:
    """The table, and the paired differences that the page tells."""
    table = pd.read_csv(PEOPLE / "results/controls.csv")
    page = (PEOPLE / "theory.md").read_text(encoding="utf-8")
    for mask, runs in table.groupby("mask"):
        cells = [str(mask)]
        for level in ("0.5", "0.3"):
            kept, steps = runs[f"kept_{level}"].dropna(), runs[f"steps_{level}"].dropna()
            cells.append(f"{kept.mean():.3f} ± {kept.std():.3f}" if len(kept) else "–")
            cells.append(f"{steps.iloc[0]:.0f}" if len(kept) else "–")
        cells.append(f"{runs.least_forget.min():.2f}")
        assert f"| {' | '.join(cells)} |" in page
    for other, level, difference, p in (
        *(("lowest h 0.2", "0.5", "0.012", "0.007"), ("lowest h 0.2", "0.3", "0.021", "0.013")),
        ("other people", "0.5", "0.003", "0.001"),
    ):
        sides = [table[table["mask"] == m][f"kept_{level}"] for m in ("curvature^1 0.2", other)]
        test = ttest_rel(*sides)
        assert f"{sides[0].mean() - sides[1].mean():.3f}" == difference
        assert f"{test.pvalue:.3f}" == p and f"{difference} less" in page
