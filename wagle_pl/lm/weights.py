"""Moved to :mod:`wagle_pl.core.weights`; this alias goes once nothing imports it from here."""

from wagle_pl.core.weights import *  # noqa: F403
