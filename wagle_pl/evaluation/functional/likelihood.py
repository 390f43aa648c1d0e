"""Measures from log-probabilities of tokens and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wagle_pl.evaluation.functional.statistics import Undefined

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


def truth_ratio(
    paraphrased_nll: Tensor, perturbed_nll: Tensor, form: TruthRatioForm = "geometric"
) -> Tensor:
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


def truth_ratio_score(
    ratio: Tensor, direction: Literal["closer_to_1", "true_better", "prob_mean"]
) -> Tensor:
    """A truth ratio as a score in [0, 1] (TOFU's and OpenUnlearning's aggregations).

    ``true_better``, max(0, 1 − R), for what must be kept; ``closer_to_1``, min(R, 1/R), for what must be forgotten;
    ``prob_mean``, 1 / (1 + R), the probability of the paraphrase against the perturbed answers.
    """
    if direction == "true_better":
        return torch.clamp(1 - ratio, min=0)
    if direction == "prob_mean":
        return 1 / (1 + ratio)
    return torch.minimum(ratio, 1 / ratio)


def nearest_option(nll: Tensor, other_nll: Tensor) -> Tensor:
    """Whether the right answer is the likeliest of the options, by length-normalised likelihood; 1 or 0 a row.

    WAGLE's forget accuracy with the likelihood in the place of a sentence embedding. A tie goes to the right answer,
    as in WAGLE's code (``max(scores) == scores[0]``).

    Args:
        nll: (N,) mean negative log-likelihood per token of the right answers.
        other_nll: (N, K) the same of the wrong ones; NaN where a row has fewer than K.

    >>> nearest_option(torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 4.0], [2.0, 4.0]]))
    tensor([1., 0.])
    """
    return (nll <= other_nll.nan_to_num(nan=torch.inf).min(-1).values).to(nll.dtype)


def choice_accuracy(logprobs: Tensor, label: Tensor) -> Tensor:
    """Whether the right choice has the largest log-probability; 1 or 0 a row (lm-evaluation-harness's ``acc``).

    Args:
        logprobs: (N, K) summed log-probability of each choice; NaN where a row has fewer than K.
        label: (N,) index of the right choice.

    >>> choice_accuracy(torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([0, 1]))
    tensor([1., 0.])
    """
    return (logprobs.nan_to_num(nan=-torch.inf).argmax(-1) == label).to(logprobs.dtype)


def exact_memorization(greedy: Sequence[bool]) -> float:
    """Share of an answer's tokens that greedy decoding gets right, each after the true tokens before it.

    Tirumala et al. 2022 (arXiv 2205.10770), as OpenUnlearning's ``exact_memorization`` has it: the closing
    end-of-sequence token is left out.

    Args:
        greedy: for each token whether it has the largest probability.

    Raises:
        Undefined: if there are no tokens.

    >>> exact_memorization([True, False, True, True])
    0.75
    """
    if not len(greedy):
        raise Undefined("the answer has no token but the end-of-sequence token")
    return sum(map(bool, greedy)) / len(greedy)


def extraction_strength(greedy: Sequence[bool]) -> float:
    """How little of an answer suffices for greedy decoding to give the rest: 1 − k/n, with k the shortest prefix after
    which all n − k tokens are right.

    Carlini et al. 2021, as OpenUnlearning's ``extraction_strength`` has it: tokens are predicted after the true ones
    before them, the closing end-of-sequence token is left out, and k is at most n − 1, so that the least value is 1/n.

    Args:
        greedy: for each token whether it has the largest probability.

    Raises:
        Undefined: if there are no tokens.

    >>> extraction_strength([False, True, True, True])
    0.75
    """
    if not len(greedy):
        raise Undefined("the answer has no token but the end-of-sequence token")
    wrong = [k for k, right in enumerate(greedy) if not right]
    k = min(wrong[-1] + 1, len(greedy) - 1) if wrong else 0
    return 1 - k / len(greedy)


def perplexity(nll_sum: Tensor, count: Tensor) -> Tensor:
    """Perplexity of a corpus: exp of all its negative log-likelihood over its number of tokens (or words).

    Args:
        nll_sum: (N,) summed negative log-likelihood of each text.
        count: (N,) how many tokens, or words, of each text that is.

    Raises:
        Undefined: if nothing was counted.

    >>> perplexity(torch.tensor([2.0, 0.0]), torch.tensor([1, 1]))
    tensor(2.7183)
    """
    if not count.sum():
        raise Undefined("there is no token to predict")
    return torch.exp(nll_sum.sum() / count.sum())
