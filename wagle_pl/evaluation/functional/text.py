"""Measures of generated text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wagle_pl.evaluation.functional.likelihood import Undefined


def rouge(
    predictions: Sequence[str], targets: Sequence[str], stem: bool = True
) -> dict[str, Tensor]:
    """ROUGE-1 and ROUGE-L recall and F1 of each example, by Google's ``rouge-score``.

    Args:
        predictions: N generations.
        targets: their references.
        stem: reduce words to their stems, as TOFU does and MUSE does not.

    Returns:
        ``rouge1_recall``, ``rougeL_recall``, ``rouge1_f1``, ``rougeL_f1``: float64 of shape (N,).

    Raises:
        ValueError: if the two lists differ in length.

    >>> rouge(["the cat sat"], ["the cat sat down"])["rougeL_recall"]
    tensor([0.7500], dtype=torch.float64)
    """
    pairs = zip(targets, predictions, strict=True)
    scores = [_rouge_scorer(stem).score(*pair) for pair in pairs]
    return {
        f"{kind}_{name}": torch.tensor(
            [getattr(score[kind], measure) for score in scores], dtype=torch.float64
        )
        for kind in ("rouge1", "rougeL")
        for name, measure in (("recall", "recall"), ("f1", "fmeasure"))
    }


@cache
def _rouge_scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


def bleu(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """BLEU-4 of each example alone, 0 to 100, by ``sacrebleu.corpus_bleu``.

    WAGLE's copyright measure is their mean. 13a tokens; ``exp`` smoothing: a count of 0 is replaced
    by 1/2, 1/4, …

    Returns:
        Float64 of shape (N,).

    Raises:
        ValueError: if the two lists differ in length.

    >>> bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    tensor([100.0000], dtype=torch.float64)
    """
    from sacrebleu import corpus_bleu

    pairs = zip(predictions, targets, strict=True)
    return torch.tensor([corpus_bleu([p], [[t]]).score for p, t in pairs], dtype=torch.float64)


def contains_answer(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """Whether each generation contains its reference, whatever the case: (N,), 1 or 0.

    WAGLE's accuracy on TOFU's real authors and world facts (``eval_tofu_other`` of its code).

    >>> contains_answer(["It is PARIS.", "Lyon"], ["Paris", "Paris"])
    tensor([1., 0.], dtype=torch.float64)
    """
    pairs = zip(predictions, targets, strict=True)
    return torch.tensor([target.lower() in text.lower() for text, target in pairs]).double()


def prefix_before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of ``stops``: so MUSE cuts answers that test its knowledge.

    >>> prefix_before("Paris\\n\\nQuestion: who?", ["\\n\\n", "Question:"])
    'Paris'
    """
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def repetition(text: str, n: int = 4) -> float:
    """Share of repeated n-grams of words: 1 − distinct / all (``seq-rep-n``, arXiv 1908.04319).

    Raises:
        Undefined: if the text has no n-gram.

    >>> round(repetition("a b c d a b c d"), 9)
    0.2
    """
    counts = _ngram_counts(text.split(), n)
    if not counts:
        raise Undefined(f"the text has fewer than {n} words")
    return 1 - len(counts) / sum(counts)


def ngram_entropy(text: str) -> float:
    """Fluency: the mean of 2/3 H(bigrams) and 4/3 H(trigrams), entropies of words in bits.

    ROME (arXiv 2202.05262) and RWKU (arXiv 2406.10890) report it; words are split at white space
    here.

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
        counts = torch.tensor(_ngram_counts(words, n), dtype=torch.float64)
        share = counts / counts.sum()
        entropies.append(weight * -(share * share.log2()).sum().item())
    return sum(entropies) / 2 + 0.0  # no negative zero


def _ngram_counts(words: Sequence[str], n: int) -> list[int]:
    """How often each distinct n-gram occurs."""
    return list(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values())


def degenerate(text: str) -> bool:
    """Whether a text is without letters and digits, or repeats at least half of its 4-grams.

    >>> degenerate("!!!"), degenerate("no no no no no no no"), degenerate("It meets at noon.")
    (True, True, False)
    """
    if not any(character.isalnum() for character in text):
        return True
    return len(text.split()) > 4 and repetition(text) >= 0.5
