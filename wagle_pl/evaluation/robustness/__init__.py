"""Is it gone, or hidden? Attacks that try to bring forgotten knowledge back; see :class:`Attack` for one's own."""

from __future__ import annotations

from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import FORGET_MEASURES, Finding
from wagle_pl.evaluation.robustness.probe import Probe
from wagle_pl.evaluation.robustness.prompts import InContext, Paraphrase, TranslatedStyle
from wagle_pl.evaluation.robustness.quantise import Quantise
from wagle_pl.evaluation.robustness.relearn import Relearn
from wagle_pl.evaluation.robustness.report import ROBUSTNESS_FILE, Report
from wagle_pl.evaluation.robustness.run import Attacks, find_attacks, run_attacks, usable
from wagle_pl.evaluation.robustness.sample import Sample
from wagle_pl.evaluation.robustness.subject import Subject

#: What ``--model.robustness all`` runs.
EVERY = (Relearn, Quantise, Paraphrase, TranslatedStyle, InContext, Sample, Probe)

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
    "Report",
    "Sample",
    "Subject",
    "TranslatedStyle",
    "find_attacks",
    "run_attacks",
    "usable",
]
