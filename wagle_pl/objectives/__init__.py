"""Forget terms, retain terms and what they see of a batch."""

from wagle_pl.objectives.forget import (
    CEU,
    DPO,
    KL,
    NPO,
    PO,
    RMU,
    UNDIAL,
    WGA,
    FineTune,
    GradAscent,
    GradDiff,
    IdkNLL,
    L1Sparse,
    RandomLabel,
    SatImp,
    SimNPO,
)
from wagle_pl.objectives.objective import Objective
from wagle_pl.objectives.retain import RetainTerm
from wagle_pl.objectives.schedules import Schedule
from wagle_pl.objectives.streams import Answers, Streams

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
    "GradAscent",
    "GradDiff",
    "IdkNLL",
    "L1Sparse",
    "Objective",
    "RandomLabel",
    "RetainTerm",
    "SatImp",
    "Schedule",
    "SimNPO",
    "Streams",
]
