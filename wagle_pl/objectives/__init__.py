"""Forget terms, retain terms and what they see of a batch."""

from wagle_pl.objectives import forget, targets
from wagle_pl.objectives.forget import *  # noqa: F403
from wagle_pl.objectives.objective import Schedule
from wagle_pl.objectives.retain import RetainTerm
from wagle_pl.objectives.targets import *  # noqa: F403

__all__ = [*forget.__all__, *targets.__all__, "RetainTerm", "Schedule"]
