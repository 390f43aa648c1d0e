"""Unit, direction and meaning of every measure that more than one suite has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Direction = Literal["higher", "lower", "retrained"]


@dataclass(frozen=True)
class Info:
    """What is known of a measure, for the sidecar of ``metrics.json``.

    Attributes:
        unit: of the number.
        direction: what is better: ``higher``, ``lower``, or nearer to the ``retrained`` model's value.
        what: the measure in words, with its source.
    """

    unit: str
    direction: Direction
    what: str


class _Entry(NamedTuple):
    unit: str
    keep: Direction  # on rows to keep, and of measures of the whole
    forget: Direction  # on rows to be forgotten
    what: str


_SHARE = "share, 0 to 1"
_SCORE = "score, 0 to 1"

_CATALOGUE = {
    "probability": _Entry(
        "probability, 0 to 1",
        "higher",
        "lower",
        "length-normalised probability of the answer, on TOFU's option sets that among the options",
    ),
    "rougeL_recall": _Entry(
        _SHARE, "higher", "lower", "ROUGE-L recall of the generation (TOFU, WAGLE)"
    ),
    "rougeL_f1": _Entry(_SHARE, "higher", "lower", "ROUGE-L F1 of the generation"),
    "rouge1_recall": _Entry(_SHARE, "higher", "lower", "ROUGE-1 recall of the generation"),
    "truth_ratio": _Entry(
        _SCORE,
        "higher",
        "higher",
        "truth ratio as a score: max(0, 1 - R) for rows to keep, min(R, 1/R) for the others (TOFU)",
    ),
    "truth_probability": _Entry(
        "probability, 0 to 1",
        "higher",
        "lower",
        "paraphrase against perturbed answers, 1 / (1 + R) (OpenUnlearning's prob_mean)",
    ),
    "exact_memorization": _Entry(
        _SHARE, "higher", "lower", "answer tokens that greedy decoding gets right (OpenUnlearning)"
    ),
    "extraction_strength": _Entry(
        _SHARE,
        "higher",
        "lower",
        "share of the answer that its beginning extracts (OpenUnlearning)",
    ),
    "accuracy": _Entry(_SHARE, "higher", "lower", "right option the likeliest"),
    "accuracy_norm": _Entry(
        _SHARE, "higher", "lower", "right choice's text the likeliest per token"
    ),
    "contains_answer": _Entry(
        _SHARE, "higher", "lower", "generation contains the answer (WAGLE's accuracy)"
    ),
    "nearest_answer": _Entry(
        _SHARE,
        "higher",
        "lower",
        "right answer the nearest to the generation by sentence embedding (WAGLE's accuracy)",
    ),
    "bleu": _Entry("0 to 100", "higher", "lower", "mean sentence BLEU of the generation (WAGLE)"),
    "perplexity": _Entry(
        "perplexity", "lower", "retrained", "exp of the mean negative log-likelihood of a token"
    ),
    "word_perplexity": _Entry(
        "perplexity",
        "lower",
        "retrained",
        "the same per word of the text as it stands (lm-evaluation-harness detokenises WikiText "
        "first: another number)",
    ),
    "toxicity": _Entry(
        _SCORE, "lower", "lower", "mean toxicity of the generations by the classifier (WAGLE)"
    ),
    "toxic_rate": _Entry(_SHARE, "lower", "lower", "generations with a toxicity above 0.5"),
    "repetition": _Entry(_SHARE, "lower", "lower", "4-grams of the generations that are repeated"),
    "fluency": _Entry(
        "bits", "higher", "higher", "weighted entropy of bigrams and trigrams (ROME, RWKU)"
    ),
    "degenerate": _Entry(
        _SHARE,
        "lower",
        "lower",
        "generations that are empty, without letters, or mostly repetition",
    ),
    "empty": _Entry(_SHARE, "lower", "lower", "generations that are empty"),
    "mia_loss": _Entry("AUC, 0 to 1", "retrained", "retrained", "membership inference by loss"),
    "mia_zlib": _Entry(
        "AUC, 0 to 1",
        "retrained",
        "retrained",
        "membership inference by loss over compressed length",
    ),
    "mia_min_k": _Entry(
        "AUC, 0 to 1", "retrained", "retrained", "membership inference by Min-40% Prob"
    ),
    "mia_min_k_plus_plus": _Entry(
        "AUC, 0 to 1", "retrained", "retrained", "membership inference by Min-40%++"
    ),
    "mia_reference": _Entry(
        "AUC, 0 to 1", "retrained", "retrained", "membership inference against a reference model"
    ),
    "mia_gradnorm": _Entry(
        "AUC, 0 to 1", "retrained", "retrained", "membership inference by gradient norm"
    ),
    "privleak": _Entry(
        "percent",
        "retrained",
        "retrained",
        "Min-40% area of this model against the retrained model's (MUSE); ideal: 0",
    ),
    "model_utility": _Entry(
        _SCORE, "higher", "higher", "harmonic mean of nine measures on rows to keep (TOFU)"
    ),
    "forget_quality": _Entry(
        "p-value",
        "higher",
        "higher",
        "KS test of the forget rows' truth ratios against the retrained model's (TOFU)",
    ),
    "ue_average": _Entry(
        _SCORE, "higher", "higher", "unlearning efficacy, the UE average of WAGLE's tables"
    ),
    "ut_average": _Entry(_SCORE, "higher", "higher", "utility, the UT average of WAGLE's tables"),
}


def lookup(short: str, forget: bool) -> Info:
    """What is known of a measure.

    Args:
        short: its name without the test set.
        forget: whether its rows are to be forgotten.
    """
    entry = _CATALOGUE.get(short, _Entry("number", "higher", "lower", short.replace("_", " ")))
    return Info(entry.unit, entry.forget if forget else entry.keep, entry.what)
