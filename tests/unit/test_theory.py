"""``configs/people/theory.md``: which set has the least trade-off, and what the published study measured."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

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
    for row in found.itertuples():
        name = row.mask.replace("gamma=1e-06", "γ=1e-6")
        kept_by = ["–" if np.isnan(v) else f"{v:.3f}" for v in (row.NPO, row.GradDiff)]
        cells = [name, *(f"{v:.2f}" for v in (row.gain, row.damage, row.trade_off)), *kept_by]
        assert f"| {' | '.join(cells)} |" in page
