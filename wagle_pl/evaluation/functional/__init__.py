"""The measures as pure functions: tensors or lists in, tensors or numbers out. The Metrics wrap these."""

from wagle_pl.evaluation.functional.likelihood import (
    TruthRatioForm,
    answer_probability,
    choice_accuracy,
    exact_memorization,
    extraction_strength,
    nearest_option,
    option_probability,
    perplexity,
    truth_ratio,
    truth_ratio_score,
)
from wagle_pl.evaluation.functional.membership import (
    membership_auc,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    zlib_ratio,
)
from wagle_pl.evaluation.functional.statistics import (
    Undefined,
    harmonic_mean,
    ks_test,
    mean,
    unlearning_efficacy,
)
from wagle_pl.evaluation.functional.text import (
    bleu,
    contains_answer,
    degenerate,
    ngram_entropy,
    prefix_before,
    repetition,
    rouge,
)

__all__ = [
    "TruthRatioForm",
    "Undefined",
    "answer_probability",
    "bleu",
    "choice_accuracy",
    "contains_answer",
    "degenerate",
    "exact_memorization",
    "extraction_strength",
    "harmonic_mean",
    "ks_test",
    "mean",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "nearest_option",
    "ngram_entropy",
    "option_probability",
    "perplexity",
    "prefix_before",
    "privacy_leakage",
    "repetition",
    "rouge",
    "truth_ratio",
    "truth_ratio_score",
    "unlearning_efficacy",
    "zlib_ratio",
]
