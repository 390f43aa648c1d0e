"""Studies: ways to unlearn one model, compared at equal forgetting."""

from wagle_pl.study.curves import envelope, mean_utility, paired, utility_at
from wagle_pl.study.study import Study

__all__ = ["Study", "envelope", "mean_utility", "paired", "utility_at"]
