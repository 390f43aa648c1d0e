"""The measures as pure functions: tensors or lists in, tensors out. The Metrics in ``metrics.py`` wrap these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

TruthRatioForm = Literal["geometric", "arithmetic"]


def answer_probability(nll: Tensor) -> Tensor:
    """Length-normalised probability of an answer, P(a|q)^(1/|a|) (TOFU, arXiv 2401.06121, section 2.2).

    Args:
        nll: mean negative log-likelihood per answer token, any shape.

    >>> answer_probability(torch.tensor([0.0, 0.6931472]))
    tensor([1.0000, 0.5000])
    """
    return torch.exp(-nll)


def option_probability(nll: Tensor, other_nll: Tensor) -> Tensor:
    """Probability of the right answer among its alternatives: p / (p + Σ p_i) of length-normalised probabilities.

    Args:
        nll: (N,) mean negative log-likelihood per token of the right answers.
        other_nll: (N, K) the same of K wrong answers each; NaN where a row has fewer than K.

    >>> option_probability(torch.tensor([0.0]), torch.tensor([[0.0, 0.0, 0.0]]))
    tensor([0.2500])
    """
    right = torch.exp(-nll)
    return right / (right + torch.exp(-other_nll).nansum(-1))


def truth_ratio(paraphrased_nll: Tensor, perturbed_nll: Tensor, form: TruthRatioForm = "geometric") -> Tensor:
    """How likely wrong answers are against a paraphrase of the right one (TOFU, equation 1).

    ``arithmetic`` is the paper's equation, the mean of the perturbed answers' probabilities over the paraphrase's
    probability; ``geometric``, as TOFU's aggregation script has it, takes the mean of their losses. Small: the model
    prefers the truth. About 1: it does not know.

    Args:
        paraphrased_nll: (N,) mean negative log-likelihood per token of the paraphrased right answer.
        perturbed_nll: (N, K) the same of the wrong answers; NaN where a row has fewer than K.
        form: ``geometric`` or ``arithmetic``.

    >>> truth_ratio(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]))
    tensor([1.])
    """
    if form == "geometric":
        return torch.exp(paraphrased_nll - perturbed_nll.nanmean(-1))
    return torch.exp(-perturbed_nll).nanmean(-1) / torch.exp(-paraphrased_nll)


def truth_ratio_score(ratio: Tensor, direction: Literal["closer_to_1", "true_better"]) -> Tensor:
    """A truth ratio as a score in [0, 1], higher is better (TOFU's aggregation).

    ``true_better``, max(0, 1 − R), for what must be kept; ``closer_to_1``, min(R, 1/R), for what must be forgotten.
    """
    if direction == "true_better":
        return torch.clamp(1 - ratio, min=0)
    return torch.minimum(ratio, 1 / ratio)


def ks_test(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Two-sample Kolmogorov–Smirnov test: (statistic, p-value). The p-value of two truth-ratio samples, those of an
    unlearned and of a retrained model, is TOFU's forget quality."""
    from scipy.stats import ks_2samp

    result = ks_2samp(a.double().cpu().numpy(), b.double().cpu().numpy())
    return float(result.statistic), float(result.pvalue)


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean; 0 when a value is 0. TOFU's model utility is that of nine numbers."""
    return torch.zeros((), dtype=values.dtype) if (values <= 0).any() else values.numel() / (1 / values).sum()


def rouge(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """ROUGE-1 and ROUGE-L recall and F1 with stemming, one value an example, by Google's ``rouge-score``.

    Returns:
        ``rouge1_recall``, ``rougeL_recall``, ``rouge1_f1``, ``rougeL_f1``: float64 tensors of shape (N,).

    Raises:
        ValueError: if the two lists differ in length.

    >>> rouge(["the cat sat"], ["the cat sat down"])["rougeL_recall"]
    tensor([0.7500], dtype=torch.float64)
    """
    scorer = _rouge_scorer()
    scores = [scorer.score(target, prediction) for prediction, target in zip(predictions, targets, strict=True)]

    def column(kind: str, measure: str) -> Tensor:
        return torch.tensor([getattr(score[kind], measure) for score in scores], dtype=torch.float64)

    return {
        f"{kind}_{label}": column(kind, measure)
        for kind in ("rouge1", "rougeL")
        for label, measure in (("recall", "recall"), ("f1", "fmeasure"))
    }


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
