"""Forget terms, retain terms and what they see of a batch."""

from wagle_pl.objectives import forget
from wagle_pl.objectives.forget import *  # noqa: F403
from wagle_pl.objectives.retain import RetainTerm
from wagle_pl.objectives.schedules import Schedule

__all__ = [*forget.__all__, "RetainTerm", "Schedule"]
