"""The suite's front door in Python: :func:`forget`, and what it returns."""

from wagle_pl.api.forgetting import forget
from wagle_pl.api.result import Forgotten

__all__ = ["Forgotten", "forget"]
