"""Old names of :mod:`wagle_pl.evaluation.attacks`, until their last callers have moved."""

from wagle_pl.evaluation.attacks import load_other, model_of, results_of

__all__ = ["load_other", "model_of", "results_of"]
