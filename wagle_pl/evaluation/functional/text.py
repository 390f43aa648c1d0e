"""Measures from generated text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wagle_pl.evaluation.functional.statistics import Undefined

#: The tokenisation of mteval-v13a, which sacrebleu calls ``13a``: (pattern, replacement), applied in turn.
_MTEVAL = (
    (r"<skipped>", ""),
    (r"-\n", ""),
    (r"\n", " "),
    (r"&quot;", '"'),
    (r"&amp;", "&"),
    (r"&lt;", "<"),
    (r"&gt;", ">"),
    (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),
    (r"([^0-9])([\.,])", r"\1 \2 "),
    (r"([\.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)
_ORDERS = 4


def rouge(
    predictions: Sequence[str], targets: Sequence[str], stem: bool = True
) -> dict[str, Tensor]:
    """ROUGE-1 and ROUGE-L recall and F1, one value an example, by Google's ``rouge-score``.

    Args:
        predictions: N generations.
        targets: their references.
        stem: reduce words to their stems, as TOFU does and MUSE does not.

    Returns:
        ``rouge1_recall``, ``rougeL_recall``, ``rouge1_f1``, ``rougeL_f1``: float64 tensors of shape (N,).

    Raises:
        ValueError: if the two lists differ in length.

    >>> rouge(["the cat sat"], ["the cat sat down"])["rougeL_recall"]
    tensor([0.7500], dtype=torch.float64)
    """
    scorer = _rouge_scorer(stem)
    scores = [
        scorer.score(target, prediction)
        for prediction, target in zip(predictions, targets, strict=True)
    ]

    def column(kind: str, measure: str) -> Tensor:
        return torch.tensor(
            [getattr(score[kind], measure) for score in scores], dtype=torch.float64
        )

    return {
        f"{kind}_{label}": column(kind, measure)
        for kind in ("rouge1", "rougeL")
        for label, measure in (("recall", "recall"), ("f1", "fmeasure"))
    }


@cache
def _rouge_scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


def bleu(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """BLEU-4 of each example alone, 0 to 100, as ``sacrebleu.corpus_bleu([prediction], [[target]])`` gives it.

    WAGLE's copyright measure is their mean. 13a tokens; a count of 0 is replaced by 1/2, 1/4, … (``exp`` smoothing).

    Returns:
        Float64 of shape (N,).

    Raises:
        ValueError: if the two lists differ in length.

    >>> bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    tensor([100.], dtype=torch.float64)
    """
    pairs = zip(predictions, targets, strict=True)
    return torch.tensor(
        [_sentence_bleu(_mteval(p), _mteval(t)) for p, t in pairs], dtype=torch.float64
    )


def _mteval(text: str) -> list[str]:
    text = f" {text.rstrip()} "
    for pattern, replacement in _MTEVAL:
        text = re.sub(pattern, replacement, text)
    return text.split()


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _sentence_bleu(prediction: list[str], target: list[str]) -> float:
    matches = [
        sum((_ngrams(prediction, n) & _ngrams(target, n)).values()) for n in range(1, _ORDERS + 1)
    ]
    if not any(matches) or len(prediction) < _ORDERS:
        return 0.0
    smooth, logs = 1.0, 0.0
    for n, match in enumerate(matches, 1):
        if not match:
            smooth *= 2
        logs += math.log((match or 1 / smooth) / (len(prediction) - n + 1))
    brevity = min(0.0, 1 - len(target) / len(prediction))
    return 100 * math.exp(brevity + logs / _ORDERS)


def contains_answer(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """Whether a generation contains its reference, whatever the case; 1 or 0 a row.

    WAGLE's accuracy on TOFU's real authors and world facts (``eval_tofu_other`` of its code).

    >>> contains_answer(["It is PARIS.", "Lyon"], ["Paris", "Paris"])
    tensor([1., 0.], dtype=torch.float64)
    """
    pairs = zip(predictions, targets, strict=True)
    return torch.tensor(
        [float(target.lower() in text.lower()) for text, target in pairs], dtype=torch.float64
    )


def prefix_before(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of ``stops``, as MUSE cuts the answers of its knowledge memorisation.

    >>> prefix_before("Paris\\n\\nQuestion: who?", ["\\n\\n", "Question:"])
    'Paris'
    """
    for stop in stops:
        text = text.split(stop)[0]
    return text


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that stood in it before: 1 − distinct/all (``seq-rep-n``, arXiv 1908.04319).

    Raises:
        Undefined: if the text has no n-gram.

    >>> round(repetition("a b c d a b c d"), 9)
    0.2
    """
    grams = _ngrams(text.split(), n)
    if not grams:
        raise Undefined(f"the text has fewer than {n} words")
    return 1 - len(grams) / sum(grams.values())


def ngram_entropy(text: str) -> float:
    """Fluency as the entropy of a text's word n-grams in bits: the mean of 2/3 H(bigrams) and 4/3 H(trigrams).

    ROME (arXiv 2202.05262) and RWKU (arXiv 2406.10890) report it; words are split at white space here.

    Raises:
        Undefined: if the text has fewer than three words.

    >>> ngram_entropy("a a a a")
    0.0
    """
    words = text.split()
    if len(words) < 3:
        raise Undefined("the text has fewer than 3 words")
    entropies = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = torch.tensor(list(_ngrams(words, n).values()), dtype=torch.float64)
        share = counts / counts.sum()
        entropies.append(weight * -(share * share.log2()).sum().item())
    return sum(entropies) / 2 + 0.0  # no negative zero


def degenerate(text: str) -> bool:
    """Whether a generation is no language: empty, without a letter or digit, or at least half of its 4-grams repeated.

    >>> degenerate("!!!"), degenerate("no no no no no no no no no"), degenerate("It meets in a bakery.")
    (True, True, False)
    """
    if not any(character.isalnum() for character in text):
        return True
    return len(text.split()) > 4 and repetition(text) >= 0.5
