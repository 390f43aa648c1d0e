"""Measures as pure functions: tensors or texts in, tensors or numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

TruthRatioForm = Literal["geometric", "arithmetic", "openunlearning"]
TINY = 1e-10  # what OpenUnlearning adds to denominators


class Undefined(ValueError):
    """A measure that the data do not define, and why. It is reported as such, never as 0 or NaN."""


def mean(values: Tensor, what: str = "values") -> float:
    """Mean of a tensor of any shape; Undefined if it is empty or has NaN."""
    return _numbers(values, what).double().mean().item()


def _numbers(values: Tensor, what: str) -> Tensor:
    if not values.numel():
        raise Undefined(f"there are no {what}")
    if missing := int(torch.isnan(values).sum()):
        raise Undefined(f"{missing} of {values.numel()} {what} are not numbers")
    return values


def ks_test(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Two-sample Kolmogorov–Smirnov test of (N,) and (M,) values: (statistic, p-value). The p-value
    of the truth ratios of an unlearned and of a retrained model is TOFU's forget quality."""
    from scipy.stats import ks_2samp

    result = ks_2samp(a.double().cpu().numpy(), b.double().cpu().numpy())
    return float(result.statistic), float(result.pvalue)


def unlearning_efficacy(forgotten: Sequence[float], remaining: Sequence[float] = ()) -> float:
    """UE average of WAGLE's tables (arXiv 2410.17509, table 1): the mean of measures in [0, 1] that
    grow with forgetting, and of one minus each that falls."""
    terms = [*forgotten, *(1 - value for value in remaining)]
    return mean(torch.tensor(terms, dtype=torch.float64), "terms")


# -- answers: an nll is a mean negative log-likelihood per token ---------------------------------


def option_probability(nll: Tensor, other_nll: Tensor, tiny: float = 0.0) -> Tensor:
    """Probability of the right answer among its alternatives: p / (p + Σ p_i) of length-normalised
    probabilities (TOFU, arXiv 2401.06121, section 2.2).

    Args:
        nll: (N,) of the right answers.
        other_nll: (N, K) of the wrong ones; NaN where a row has fewer than K.
        tiny: added to the denominator; OpenUnlearning adds :data:`TINY`.

    >>> option_probability(torch.tensor([0.0]), torch.tensor([[0.0, 0.0, 0.0]]))
    tensor([0.2500])
    """
    right = torch.exp(-nll)
    return right / (right + torch.exp(-other_nll).nansum(-1) + tiny)


def truth_ratio(
    paraphrased_nll: Tensor, perturbed_nll: Tensor, form: TruthRatioForm = "geometric"
) -> Tensor:
    """How likely wrong answers are against a paraphrase of the right one (TOFU, equation 1).

    ``arithmetic`` is the paper's equation, the mean of the perturbed answers' probabilities over
    the paraphrase's; ``geometric``, as in TOFU's aggregation script, takes the mean of their
    losses; ``openunlearning`` is the latter with 1e-10 added to the paraphrase's probability, which
    changes the ratio of a model that gives it less than about 20 nats a token. Small: the model
    prefers the truth. About 1: it does not know.

    Args:
        paraphrased_nll: (N,) of the paraphrased right answer.
        perturbed_nll: (N, K) of the wrong ones; NaN where a row has fewer than K.
        form: ``geometric``, ``arithmetic`` or ``openunlearning``.
    """
    if form == "geometric":
        return torch.exp(paraphrased_nll - perturbed_nll.nanmean(-1))
    if form == "openunlearning":
        return torch.exp(-perturbed_nll.nanmean(-1)) / (torch.exp(-paraphrased_nll) + TINY)
    return torch.exp(-perturbed_nll).nanmean(-1) / torch.exp(-paraphrased_nll)


def choice_accuracy(logprobs: Tensor, label: Tensor) -> Tensor:
    """Whether the right choice has the largest log-probability, 1 or 0 per row (``acc`` of
    lm-evaluation-harness).

    Args:
        logprobs: (N, K) of each choice; NaN where a row has fewer than K.
        label: (N,) index of the right choice.
    """
    return (logprobs.nan_to_num(nan=-torch.inf).argmax(-1) == label).to(logprobs.dtype)


def exact_memorization(greedy: Sequence[bool]) -> float:
    """Share of an answer's tokens that are the likeliest, each given the true tokens before it
    (Tirumala et al. 2022, arXiv 2205.10770; OpenUnlearning, without the end-of-sequence token)."""
    return sum(map(bool, _some_tokens(greedy))) / len(greedy)


def extraction_strength(greedy: Sequence[bool]) -> float:
    """How little of an answer suffices for greedy decoding to give the rest: 1 − k/n, with k < n
    tokens in the shortest prefix after which each token is the likeliest given the true ones before
    (Carlini et al. 2021; OpenUnlearning, without the end-of-sequence token).

    >>> extraction_strength([False, True, True, True])
    0.75
    """
    wrong = [k for k, right in enumerate(_some_tokens(greedy)) if not right]
    k = min(wrong[-1] + 1, len(greedy) - 1) if wrong else 0
    return 1 - k / len(greedy)


def _some_tokens(greedy: Sequence[bool]) -> Sequence[bool]:
    if not len(greedy):
        raise Undefined("the answer has no token but the end-of-sequence token")
    return greedy


# -- membership inference: was a text among the training data? A low score says yes --------------


def min_k(logprobs: Tensor, k: float = 0.2) -> float:
    """Min-K% Prob: minus the mean of the smallest share ``k`` of (T,) log-probabilities, at least
    one of them (arXiv 2310.16789).

    >>> min_k(torch.tensor([-1.0, -2.0, -3.0, -4.0]), 0.5)
    3.5
    """
    if not logprobs.numel():
        raise Undefined("the text has no token to predict")
    count = max(1, int(logprobs.numel() * k))
    return -logprobs.double().sort().values[:count].mean().item()


def membership_auc(members: Tensor, nonmembers: Tensor) -> float:
    """How well scores identify members: P(member's score < non-member's) + ½ P(equal), the area
    under the ROC curve of (N,) and (M,) scores.

    1: members are recognised; 0.5: guessing. MUSE's ``forget_holdout`` areas are 1 minus this.

    >>> membership_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
    0.875
    """
    from scipy.stats import mannwhitneyu

    low = _numbers(members, "members").double().cpu().numpy()
    high = _numbers(nonmembers, "non-members").double().cpu().numpy()
    return float(mannwhitneyu(high, low).statistic) / (low.size * high.size)


def privacy_leakage(auc: float, retrained_auc: float) -> float:
    """MUSE's PrivLeak in percent: (a − a_retrained) / a_retrained · 100 with its areas a = 1 −
    :func:`membership_auc` of the model and of the retrained model.

    0 is ideal; near −100 the model still shows that it saw the forget data; above 0 it shows that
    they were removed.

    >>> privacy_leakage(0.75, 0.5)
    -50.0
    """
    if retrained_auc == 1:
        raise Undefined("membership in the forget set is told perfectly on the retrained model")
    return ((1 - auc) - (1 - retrained_auc)) / (1 - retrained_auc) * 100


def relative_difference(auc: float, retrained_auc: float) -> float:
    """(AUC − AUC_retrained) / AUC_retrained in percent (OpenUnlearning's ``rel_diff``).

    >>> relative_difference(0.75, 0.5)
    50.0
    """
    if not retrained_auc:
        raise Undefined("the area of the retrained model is 0")
    return (auc - retrained_auc) / retrained_auc * 100


# -- generations: N predictions and N targets in, float64 (N,) out -------------------------------


def rouge(
    predictions: Sequence[str], targets: Sequence[str], stem: bool = True
) -> dict[str, Tensor]:
    """ROUGE-1 and ROUGE-L, ``<kind>_recall`` and ``<kind>_f1``, by Google's ``rouge-score``;
    ``stem`` reduces words to their stems, as TOFU does and MUSE does not.

    >>> rouge(["the cat sat"], ["the cat sat down"])["rougeL_recall"]
    tensor([0.7500], dtype=torch.float64)
    """
    scores = list(map(_rouge_scorer(stem), targets, predictions))
    values_by_name = {}
    for kind in ("rouge1", "rougeL"):
        for name, field in (("recall", "recall"), ("f1", "fmeasure")):
            values = [getattr(score[kind], field) for score in scores]
            values_by_name[f"{kind}_{name}"] = torch.tensor(values, dtype=torch.float64)
    return values_by_name


@cache
def _rouge_scorer(stem: bool) -> Callable[[str, str], Any]:
    from rouge_score.rouge_scorer import RougeScorer

    # intervals score the same rows again and again
    return lru_cache(maxsize=50_000)(RougeScorer(["rouge1", "rougeL"], use_stemmer=stem).score)


def bleu(predictions: Sequence[str], targets: Sequence[str]) -> Tensor:
    """BLEU-4 of each example alone, 0 to 100, by ``sacrebleu.corpus_bleu``: 13a tokens, ``exp``
    smoothing. Their mean is WAGLE's copyright measure."""
    from sacrebleu import corpus_bleu

    pairs = zip(predictions, targets, strict=True)
    return torch.tensor([corpus_bleu([p], [[t]]).score for p, t in pairs], dtype=torch.float64)


def repetition(text: str, n: int = 4) -> float:
    """Share of repeated n-grams of words: 1 − distinct / all (``seq-rep-n``, arXiv 1908.04319)."""
    counts = _ngram_counts(text.split(), n)
    if not counts:
        raise Undefined(f"the text has fewer than {n} words")
    return 1 - len(counts) / sum(counts)


def ngram_entropy(text: str) -> float:
    """Fluency: the mean of 2/3 H(bigrams) and 4/3 H(trigrams), entropies in bits of words between
    white space (ROME, arXiv 2202.05262; RWKU, arXiv 2406.10890)."""
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
    return list(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values())


def degenerate(text: str) -> bool:
    """Whether a text is without letters and digits, or repeats at least half of its 4-grams."""
    if not any(character.isalnum() for character in text):
        return True
    return len(text.split()) > 4 and repetition(text) >= 0.5
