"""Attacks that try to bring forgotten knowledge back, to see whether it is gone or hidden."""

from __future__ import annotations

from wagle_pl.evaluation.attacks.attack import FORGET_MEASURES, Attack
from wagle_pl.evaluation.attacks.probing import Probe, Sample
from wagle_pl.evaluation.attacks.prompts import InContext, Paraphrase, TranslatedStyle
from wagle_pl.evaluation.attacks.report import (
    EVERY,
    ROBUSTNESS_FILE,
    Attacks,
    RobustnessReport,
    find_attacks,
    load_other,
    model_of,
    results_of,
    run_attacks,
    usable_attacks,
)
from wagle_pl.evaluation.attacks.subject import Finding, Subject
from wagle_pl.evaluation.attacks.weights import Quantise, Relearn

__all__ = [
    "EVERY",
    "FORGET_MEASURES",
    "ROBUSTNESS_FILE",
    "Attack",
    "Attacks",
    "Finding",
    "InContext",
    "Paraphrase",
    "Probe",
    "Quantise",
    "Relearn",
    "RobustnessReport",
    "Sample",
    "Subject",
    "TranslatedStyle",
    "find_attacks",
    "load_other",
    "model_of",
    "results_of",
    "run_attacks",
    "usable_attacks",
]
