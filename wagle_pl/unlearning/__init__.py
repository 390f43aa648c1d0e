"""Objectives, masked optimisation, and the modules that train."""

from wagle_pl.objectives.forget import (
    CEU,
    DPO,
    KL,
    NPO,
    PO,
    RMU,
    UNDIAL,
    WGA,
    Answers,
    FineTune,
    GradAscent,
    GradDiff,
    IdkNLL,
    L1Sparse,
    Objective,
    RandomLabel,
    SatImp,
    SimNPO,
    Streams,
)
from wagle_pl.objectives.retain import RetainTerm
from wagle_pl.objectives.schedules import Schedule
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.module import FinetuneModule, UnlearnModule
from wagle_pl.unlearning.optim import MaskedAdamW, Sophia

__all__ = [
    "CEU",
    "DPO",
    "KL",
    "NPO",
    "PO",
    "RMU",
    "UNDIAL",
    "WGA",
    "Answers",
    "FineTune",
    "FinetuneModule",
    "GradAscent",
    "GradDiff",
    "IdkNLL",
    "L1Sparse",
    "LoRA",
    "MaskedAdamW",
    "Objective",
    "RandomLabel",
    "RetainTerm",
    "SatImp",
    "Schedule",
    "SimNPO",
    "Sophia",
    "Streams",
    "UnlearnModule",
]
