"""Measures as pure functions: tensors or lists in, tensors or numbers out."""

# ruff: noqa: F401
from wagle_pl.evaluation.functional.likelihood import (
    TruthRatioForm,
    Undefined,
    answer_probability,
    choice_accuracy,
    exact_memorization,
    extraction_strength,
    ks_test,
    mean,
    membership_auc,
    min_k,
    min_k_plus_plus,
    nearest_option,
    option_probability,
    perplexity,
    privacy_leakage,
    truth_ratio,
    truth_ratio_score,
    unlearning_efficacy,
    zlib_ratio,
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
