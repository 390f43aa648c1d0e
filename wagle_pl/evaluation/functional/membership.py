"""Membership inference: was a text among the training data? Scores of one text, and how well they tell.

As in MUSE (arXiv 2407.06460) and OpenUnlearning, a *low* score says member.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from wagle_pl.evaluation.functional.statistics import Undefined


def zlib_ratio(nll: float, text: str) -> float:
    """Mean negative log-likelihood over the length of the compressed text in bytes (Carlini et al. 2021).

    Args:
        nll: mean negative log-likelihood per token.
        text: the text.
    """
    return nll / len(zlib.compress(text.encode("utf-8")))


def min_k(logprobs: Tensor, k: float = 0.2) -> float:
    """Min-K% Prob: minus the mean of the share ``k`` of smallest token log-probabilities (arXiv 2310.16789).

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
    """Min-K%++: as Min-K% Prob, of log-probabilities standardised by those of the whole vocabulary (arXiv 2404.02936).

    Args:
        logprobs: (T,) log-probabilities of a text's tokens.
        mean: (T,) mean of the vocabulary's log-probabilities at each token, under the model's own distribution.
        std: (T,) their standard deviation.
        k: in (0, 1]; at least one token is taken.

    Raises:
        Undefined: if there are no tokens.
    """
    return min_k((logprobs - mean) / std, k)


def membership_auc(members: Tensor, nonmembers: Tensor) -> float:
    """How well scores tell members: P(member's score < non-member's) + ½ P(equal), the area under the ROC curve.

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
    """MUSE's PrivLeak in percent: how the area of an attack differs from that on the retrained model.

    With MUSE's areas, a = 1 − ``auc``: (a − a_retrained) / a_retrained · 100. 0 is ideal; below 0, near −100, the model
    still shows that it saw the forget data; above 0, it shows that they were removed.

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
