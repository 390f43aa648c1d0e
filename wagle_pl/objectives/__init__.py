"""Forget terms, retain terms and what they see of a batch."""

from wagle_pl.objectives import forget
from wagle_pl.objectives.forget import *  # noqa: F403
from wagle_pl.objectives.objective import Schedule
from wagle_pl.objectives.retain import RetainTerm

__all__ = [*forget.__all__, "RetainTerm", "Schedule"]
