"""Measures and the test loop every module shares."""

from wagle_pl.evaluation.metrics import AnswerProbability, ForgetQuality, Rouge, TruthRatio
from wagle_pl.evaluation.module import EvaluationModule
from wagle_pl.evaluation.tofu import tofu_forget_quality, tofu_measures, tofu_model_utility

__all__ = [
    "AnswerProbability",
    "EvaluationModule",
    "ForgetQuality",
    "Rouge",
    "TruthRatio",
    "tofu_forget_quality",
    "tofu_measures",
    "tofu_model_utility",
]
