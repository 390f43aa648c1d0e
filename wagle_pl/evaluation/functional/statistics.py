"""Aggregates and tests that measures share, and the word for a measure that the data do not define."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Undefined(ValueError):
    """A measure that the data do not define; the message says why. It is reported as such, never as 0 or NaN."""


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
    """Two-sample Kolmogorov–Smirnov test: (statistic, p-value). The p-value of two truth-ratio samples, those of an
    unlearned and of a retrained model, is TOFU's forget quality.

    Args:
        a: (N,) one sample.
        b: (M,) the other.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(a.double().cpu().numpy(), b.double().cpu().numpy())
    return float(result.statistic), float(result.pvalue)


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean; 0 when a value is 0. TOFU's model utility is that of nine numbers."""
    return (
        torch.zeros((), dtype=values.dtype)
        if (values <= 0).any()
        else values.numel() / (1 / values).sum()
    )


def unlearning_efficacy(forgotten: Sequence[float], remaining: Sequence[float] = ()) -> float:
    """UE average of WAGLE's tables (arXiv 2410.17509, table 1): the mean of measures that grow with forgetting.

    Args:
        forgotten: measures in [0, 1] that grow as the model forgets (forget quality, membership inference).
        remaining: measures in [0, 1] of what it still knows (forget accuracy, ROUGE-L); one minus each enters.

    Raises:
        Undefined: if there are none.

    >>> unlearning_efficacy([0.5, 0.7], [0.2, 0.0])
    0.75
    """
    return mean(
        torch.tensor([*forgotten, *(1 - value for value in remaining)], dtype=torch.float64),
        "terms",
    )
