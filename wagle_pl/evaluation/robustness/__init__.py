"""Old names of :mod:`wagle_pl.evaluation.attacks`, until their last callers have moved."""

from wagle_pl.evaluation.attacks import *  # noqa: F403
from wagle_pl.evaluation.attacks import RobustnessReport as Report
from wagle_pl.evaluation.attacks import usable_attacks as usable

__all__ = ["Report", "usable"]
