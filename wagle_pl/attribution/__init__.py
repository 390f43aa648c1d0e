"""Scores, Hessian estimates, exact selection, and the module that runs the pass."""

from wagle_pl.attribution.module import AttributionModule
from wagle_pl.attribution.scores import Score, Wagle, WeightStatistics

__all__ = ["AttributionModule", "Score", "Wagle", "WeightStatistics"]
