"""Measures, suites, ``evaluate``, and the callback that tests and validates every module."""

from wagle_pl.evaluation.callback import Evaluate, EvaluationModule
from wagle_pl.evaluation.evaluation import Evaluation, evaluate
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import Observer, observe_set
from wagle_pl.evaluation.options import Options, Plan
from wagle_pl.evaluation.records import MEASURES, Info, Observations, Records, measure
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.suite import Suite, SuiteSet
from wagle_pl.evaluation.suites import find_suite
from wagle_pl.evaluation.tofu import tofu_forget_quality, tofu_model_utility

__all__ = [
    "MEASURES",
    "Evaluate",
    "Evaluation",
    "EvaluationModule",
    "Info",
    "Observations",
    "Observer",
    "Options",
    "Plan",
    "Records",
    "Results",
    "Suite",
    "SuiteSet",
    "Undefined",
    "evaluate",
    "find_suite",
    "measure",
    "observe_set",
    "tofu_forget_quality",
    "tofu_model_utility",
]
