"""Measures from log-probabilities of tokens and answers, and what measures have in common."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TruthRatioForm = Literal["geometric", "arithmetic"]


class Undefined(ValueError):
    """A measure that the data do not define; the message says why. It is reported as such, never as
    0 or NaN."""


def mean(values: Tensor, what: str = "values") -> float:
    """Mean of a tensor of any shape.

    Raises:
        Undefined: if there are no values, or one is NaN.

    >>> mean(torch.tensor([1.0, 2.0]))
    1.5
    """
    if not values.numel():
        raise Undefined(f"there are no {what}")
    if torch.isnan(values).any():
        raise Undefined(
            f"{int(torch.isnan(values).sum())} of {values.numel()} {what} are not numbers"
        )
    return values.double().mean().item()


def ks_test(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Two-sample Kolmogorov–Smirnov test: (statistic, p-value). The p-value of two truth-ratio
    samples, those of an unlearned and of a retrained model, is TOFU's forget quality.

    Args:
        a: (N,) one sample.
        b: (M,) the other.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(a.double().cpu().numpy(), b.double().cpu().numpy())
    return float(result.statistic), float(result.pvalue)


def unlearning_efficacy(forgotten: Sequence[float], remaining: Sequence[float] = ()) -> float:
    """UE average of WAGLE's tables (arXiv 2410.17509, table 1): the mean of measures that grow with
    forgetting.

    Args:
        forgotten: measures in [0, 1] that grow as the model forgets (forget quality, membership
            inference).
        remaining: measures in [0, 1] of what it still knows (forget accuracy, ROUGE-L); one minus
            each enters.

    Raises:
        Undefined: if there are none.

    >>> unlearning_efficacy([0.5, 0.7], [0.2, 0.0])
    0.75
    """
    return mean(
        torch.tensor([*forgotten, *(1 - value for value in remaining)], dtype=torch.float64),
        "terms",
    )


# -- answers ------------------------------------------------------------------------------------


def answer_probability(nll: Tensor) -> Tensor:
    """Length-normalised probability of an answer, P(a|q)^(1/|a|) (TOFU, arXiv 2401.06121, section
    2.2).

    Args:
        nll: mean negative log-likelihood per answer token, any shape.

    >>> answer_probability(torch.tensor([0.0, 0.6931472]))
    tensor([1.0000, 0.5000])
    """
    return torch.exp(-nll)


def option_probability(nll: Tensor, other_nll: Tensor) -> Tensor:
    """Probability of the right answer among its alternatives: p / (p + Σ p_i) of length-normalised
    probabilities.

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

    ``arithmetic`` is the paper's equation, the mean of the perturbed answers' probabilities over
    the paraphrase's probability; ``geometric``, as TOFU's aggregation script has it, takes the mean
    of their losses. Small: the model prefers the truth. About 1: it does not know.

    Args:
        paraphrased_nll: (N,) mean negative log-likelihood per token of the paraphrased right
            answer.
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

    ``true_better``, max(0, 1 − R), for what must be kept; ``closer_to_1``, min(R, 1/R), for what
    must be forgotten; ``prob_mean``, 1 / (1 + R), the probability of the paraphrase against the
    perturbed answers.
    """
    if direction == "true_better":
        return torch.clamp(1 - ratio, min=0)
    if direction == "prob_mean":
        return 1 / (1 + ratio)
    return torch.minimum(ratio, 1 / ratio)


def nearest_option(nll: Tensor, other_nll: Tensor) -> Tensor:
    """Whether the right answer is the likeliest of the options, by length-normalised likelihood; 1
    or 0 a row.

    WAGLE's forget accuracy with the likelihood in the place of a sentence embedding. A tie goes to
    the right answer, as in WAGLE's code (``max(scores) == scores[0]``).

    Args:
        nll: (N,) mean negative log-likelihood per token of the right answers.
        other_nll: (N, K) the same of the wrong ones; NaN where a row has fewer than K.

    >>> nearest_option(torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 4.0], [2.0, 4.0]]))
    tensor([1., 0.])
    """
    return (nll <= other_nll.nan_to_num(nan=torch.inf).min(-1).values).to(nll.dtype)


def choice_accuracy(logprobs: Tensor, label: Tensor) -> Tensor:
    """Whether the right choice has the largest log-probability; 1 or 0 a row
    (lm-evaluation-harness's ``acc``).

    Args:
        logprobs: (N, K) summed log-probability of each choice; NaN where a row has fewer than K.
        label: (N,) index of the right choice.

    >>> choice_accuracy(torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([0, 1]))
    tensor([1., 0.])
    """
    return (logprobs.nan_to_num(nan=-torch.inf).argmax(-1) == label).to(logprobs.dtype)


def exact_memorization(greedy: Sequence[bool]) -> float:
    """Share of an answer's tokens that greedy decoding gets right, each after the true tokens
    before it.

    Tirumala et al. 2022 (arXiv 2205.10770), as OpenUnlearning's ``exact_memorization`` has it: the
    closing end-of-sequence token is left out.

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
    """How little of an answer suffices for greedy decoding to give the rest: 1 − k/n, with k the
    shortest prefix after which all n − k tokens are right.

    Carlini et al. 2021, as OpenUnlearning's ``extraction_strength`` has it: tokens are predicted
    after the true ones before them, the closing end-of-sequence token is left out, and k is at most
    n − 1, so that the least value is 1/n.

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
    """Perplexity of a corpus: exp of all its negative log-likelihood over its number of tokens (or
    words).

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


# -- membership inference: was a text among the training data? A low score says yes ---------------


def zlib_ratio(nll: float, text: str) -> float:
    """Mean negative log-likelihood over the length of the compressed text in bytes (Carlini et al.
    2021).

    Args:
        nll: mean negative log-likelihood per token.
        text: the text.
    """
    return nll / len(zlib.compress(text.encode("utf-8")))


def min_k(logprobs: Tensor, k: float = 0.2) -> float:
    """Min-K% Prob: minus the mean of the share ``k`` of smallest token log-probabilities (arXiv
    2310.16789).

    Args:
        logprobs: (T,) log-probabilities of a text's tokens.
        k: in (0, 1]; at least one token is taken.

    Raises:
        Undefined: if there are no tokens.

    >>> min_k(torch.tensor([-1.0, -2.0, -3.0, -4.0]), 0.5)
    3.5
    """
    if not logprobs.numel():
        raise Undefined("the text has no token to predict")
    count = max(1, int(logprobs.numel() * k))
    return -logprobs.double().sort().values[:count].mean().item()


def min_k_plus_plus(logprobs: Tensor, mean: Tensor, std: Tensor, k: float = 0.2) -> float:
    """Min-K%++: as Min-K% Prob, of log-probabilities standardised by those of the whole vocabulary
    (arXiv 2404.02936).

    Args:
        logprobs: (T,) log-probabilities of a text's tokens.
        mean: (T,) mean of the vocabulary's log-probabilities at each token, under the model's own
            distribution.
        std: (T,) their standard deviation.
        k: in (0, 1]; at least one token is taken.

    Raises:
        Undefined: if there are no tokens.
    """
    return min_k((logprobs - mean) / std, k)


def membership_auc(members: Tensor, nonmembers: Tensor) -> float:
    """How well scores tell members: P(member's score < non-member's) + ½ P(equal), the area under
    the ROC curve.

    1: members are recognised; 0.5: guessing. MUSE's ``forget_holdout`` areas are 1 minus this.

    Args:
        members: (N,) scores, low for a member.
        nonmembers: (M,) scores.

    Raises:
        Undefined: if a side is empty or holds NaN.

    >>> membership_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
    0.875
    """
    from scipy.stats import mannwhitneyu

    for side, name in ((members, "members"), (nonmembers, "non-members")):
        if not side.numel():
            raise Undefined(f"there are no {name}")
        if torch.isnan(side).any():
            raise Undefined(f"{int(torch.isnan(side).sum())} scores of {name} are not numbers")
    above = mannwhitneyu(
        nonmembers.double().cpu().numpy(), members.double().cpu().numpy()
    ).statistic
    return float(above) / (members.numel() * nonmembers.numel())


def privacy_leakage(auc: float, retrained_auc: float) -> float:
    """MUSE's PrivLeak in percent: how the area of an attack differs from that on the retrained
    model.

    With MUSE's areas, a = 1 − ``auc``: (a − a_retrained) / a_retrained · 100. 0 is ideal; below 0,
    near −100, the model still shows that it saw the forget data; above 0, it shows that they were
    removed.

    Args:
        auc: of the model, see :func:`membership_auc`.
        retrained_auc: of the retrained model.

    Raises:
        Undefined: if the retrained model's attack is perfect: nothing to compare with.

    >>> privacy_leakage(0.75, 0.5)
    -50.0
    """
    if retrained_auc == 1:
        raise Undefined("membership in the forget set is told perfectly on the retrained model")
    return ((1 - auc) - (1 - retrained_auc)) / (1 - retrained_auc) * 100
