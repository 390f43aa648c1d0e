"""The modules that train, and what they minimise."""

from wagle_pl import objectives
from wagle_pl.objectives import *  # noqa: F403
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.finetune import FinetuneModule
from wagle_pl.unlearning.optim import MaskedAdamW, SignSGD, Sophia
from wagle_pl.unlearning.step_rules import MUDMAN, SAM, StepRule
from wagle_pl.unlearning.unlearn import UnlearnModule

__all__ = [
    *objectives.__all__,
    "MUDMAN",
    "SAM",
    "FinetuneModule",
    "LoRA",
    "MaskedAdamW",
    "SignSGD",
    "Sophia",
    "StepRule",
    "UnlearnModule",
]
