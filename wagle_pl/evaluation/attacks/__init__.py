"""Attacks that try to bring forgotten knowledge back, to see whether it is gone or hidden.

More of them are in :mod:`wagle_pl.lab.attacks`.
"""

from wagle_pl.evaluation.attacks.attack import Attack, Finding, Subject
from wagle_pl.evaluation.attacks.weights import Quantise, Relearn

__all__ = ["Attack", "Finding", "Quantise", "Relearn", "Subject"]
