"""Attacks that try to bring forgotten knowledge back, to see whether it is gone or hidden."""

from wagle_pl.evaluation.attacks.attack import Attack, Finding, Subject
from wagle_pl.evaluation.attacks.probing import Probe, Sample
from wagle_pl.evaluation.attacks.prompts import InContext, Paraphrase, TranslatedStyle
from wagle_pl.evaluation.attacks.weights import Quantise, Relearn

__all__ = [
    "Attack",
    "Finding",
    "InContext",
    "Paraphrase",
    "Probe",
    "Quantise",
    "Relearn",
    "Sample",
    "Subject",
    "TranslatedStyle",
]
