"""Attacks beyond those of :mod:`wagle_pl.evaluation.attacks`: on prompts, samples, hidden layers."""

from wagle_pl.lab.attacks.probing import Paraphrase, Probe, Sample

__all__ = ["Paraphrase", "Probe", "Sample"]
