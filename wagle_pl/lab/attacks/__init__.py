"""Attacks beyond those of :mod:`wagle_pl.evaluation.attacks`: on prompts, samples, hidden layers."""

from wagle_pl.lab.attacks.probing import Probe, Sample
from wagle_pl.lab.attacks.prompts import InContext, Paraphrase

__all__ = ["InContext", "Paraphrase", "Probe", "Sample"]
