"""Objectives, masked optimisation, and the modules that train."""

from wagle_pl.unlearning.module import FinetuneModule, UnlearnModule
from wagle_pl.unlearning.objectives import NPO, PO, Answers, GradDiff, Objective, Streams
from wagle_pl.unlearning.optim import MaskedAdamW

__all__ = ["NPO", "PO", "Answers", "FinetuneModule", "GradDiff", "MaskedAdamW", "Objective", "Streams", "UnlearnModule"]
