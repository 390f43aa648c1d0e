"""Measures as pure functions: tensors or lists in, tensors or numbers out."""

from wagle_pl.evaluation.functional.likelihood import (
    TruthRatioForm as TruthRatioForm,
)
from wagle_pl.evaluation.functional.likelihood import (
    Undefined as Undefined,
)
from wagle_pl.evaluation.functional.likelihood import (
    answer_probability as answer_probability,
)
from wagle_pl.evaluation.functional.likelihood import (
    choice_accuracy as choice_accuracy,
)
from wagle_pl.evaluation.functional.likelihood import (
    exact_memorization as exact_memorization,
)
from wagle_pl.evaluation.functional.likelihood import (
    extraction_strength as extraction_strength,
)
from wagle_pl.evaluation.functional.likelihood import (
    ks_test as ks_test,
)
from wagle_pl.evaluation.functional.likelihood import (
    mean as mean,
)
from wagle_pl.evaluation.functional.likelihood import (
    membership_auc as membership_auc,
)
from wagle_pl.evaluation.functional.likelihood import (
    min_k as min_k,
)
from wagle_pl.evaluation.functional.likelihood import (
    min_k_plus_plus as min_k_plus_plus,
)
from wagle_pl.evaluation.functional.likelihood import (
    nearest_option as nearest_option,
)
from wagle_pl.evaluation.functional.likelihood import (
    option_probability as option_probability,
)
from wagle_pl.evaluation.functional.likelihood import (
    perplexity as perplexity,
)
from wagle_pl.evaluation.functional.likelihood import (
    privacy_leakage as privacy_leakage,
)
from wagle_pl.evaluation.functional.likelihood import (
    truth_ratio as truth_ratio,
)
from wagle_pl.evaluation.functional.likelihood import (
    truth_ratio_score as truth_ratio_score,
)
from wagle_pl.evaluation.functional.likelihood import (
    unlearning_efficacy as unlearning_efficacy,
)
from wagle_pl.evaluation.functional.likelihood import (
    zlib_ratio as zlib_ratio,
)
from wagle_pl.evaluation.functional.text import (
    bleu as bleu,
)
from wagle_pl.evaluation.functional.text import (
    contains_answer as contains_answer,
)
from wagle_pl.evaluation.functional.text import (
    degenerate as degenerate,
)
from wagle_pl.evaluation.functional.text import (
    ngram_entropy as ngram_entropy,
)
from wagle_pl.evaluation.functional.text import (
    prefix_before as prefix_before,
)
from wagle_pl.evaluation.functional.text import (
    repetition as repetition,
)
from wagle_pl.evaluation.functional.text import (
    rouge as rouge,
)
