"""Scores, Hessian estimates, exact selection, and the module that runs the pass."""

from wagle_pl.attribution import scores
from wagle_pl.attribution.collect import Job, collect
from wagle_pl.attribution.module import AttributionModule
from wagle_pl.attribution.scores import *  # noqa: F403
from wagle_pl.attribution.scoring import Collected, MaskSpec
from wagle_pl.attribution.stored import mask_from_scores

__all__ = [
    *scores.__all__,
    "AttributionModule",
    "Collected",
    "Job",
    "MaskSpec",
    "collect",
    "mask_from_scores",
]
