"""Measures, suites, and the callback that tests and validates every module."""

from wagle_pl.evaluation.evaluate import Evaluate
from wagle_pl.evaluation.metrics import AnswerProbability, ForgetQuality, Rouge, TruthRatio
from wagle_pl.evaluation.module import EvaluationModule
from wagle_pl.evaluation.observe import Observer, observe_set
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.suites import Observations, Suite, Undefined, find_suite
from wagle_pl.evaluation.tofu import tofu_forget_quality, tofu_measures, tofu_model_utility

__all__ = [
    "AnswerProbability",
    "Evaluate",
    "EvaluationModule",
    "ForgetQuality",
    "Observations",
    "Observer",
    "Results",
    "Rouge",
    "Suite",
    "TruthRatio",
    "Undefined",
    "find_suite",
    "observe_set",
    "tofu_forget_quality",
    "tofu_measures",
    "tofu_model_utility",
]
