"""Scores, Hessian estimates, exact selection, and the module that runs the pass."""

from wagle_pl.attribution.collect import Job, collect
from wagle_pl.attribution.module import AttributionModule
from wagle_pl.attribution.scores import (
    Curvature,
    FisherRatio,
    ForgetRetainRatio,
    Gradient,
    Magnitude,
    Modules,
    Random,
    Score,
    Signed,
    Snip,
    Wagle,
    Wanda,
    WeightStatistics,
)
from wagle_pl.attribution.scoring import (
    Collected,
    MaskSpec,
    importance_from_scores,
    mask_from_scores,
)

__all__ = [
    "AttributionModule",
    "Collected",
    "Curvature",
    "FisherRatio",
    "ForgetRetainRatio",
    "Gradient",
    "Job",
    "Magnitude",
    "MaskSpec",
    "Modules",
    "Random",
    "Score",
    "Signed",
    "Snip",
    "Wagle",
    "Wanda",
    "WeightStatistics",
    "collect",
    "importance_from_scores",
    "mask_from_scores",
]
