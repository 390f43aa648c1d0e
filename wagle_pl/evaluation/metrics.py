"""torchmetrics around the functionals: update with a batch, compute over everything seen, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from wagle_pl.evaluation import functional as F


class AnswerProbability(MeanMetric):
    """Mean length-normalised probability of the answers.

    >>> metric = AnswerProbability()
    >>> metric.update(torch.tensor([0.0, 0.0]))
    >>> metric.compute()
    tensor(1.)
    """

    higher_is_better = True

    def update(self, nll: Tensor, other_nll: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            nll: (N,) mean negative log-likelihood per answer token.
            other_nll: (N, K) the same of wrong answers; then the probability is that among the K + 1 answers.
        """
        super().update(F.answer_probability(nll) if other_nll is None else F.option_probability(nll, other_nll))


class Rouge(MeanMetric):
    """Mean ROUGE recall or F1 of generations.

    Args:
        measure: ``rougeL_recall``, ``rouge1_recall``, ``rougeL_f1`` or ``rouge1_f1``.

    >>> metric = Rouge()
    >>> metric.update(["the cat sat"], ["the cat sat down"])
    >>> round(metric.compute().item(), 2)
    0.75
    """

    higher_is_better = True

    def __init__(self, measure: str = "rougeL_recall", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.measure = measure

    def update(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of generations and their references."""
        super().update(F.rouge(predictions, targets)[self.measure])


class TruthRatio(MeanMetric):
    """Mean truth ratio as a score in [0, 1], higher is better.

    Args:
        direction: ``true_better`` for rows to keep, ``closer_to_1`` for rows to forget.
        form: ``geometric`` or ``arithmetic``, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    >>> metric = TruthRatio("true_better")
    >>> metric.update(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]))
    >>> metric.compute()
    tensor(0.)
    """

    higher_is_better = True

    def __init__(
        self,
        direction: Literal["closer_to_1", "true_better"] = "true_better",
        form: F.TruthRatioForm = "geometric",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.direction = direction
        self.form = form

    def update(self, paraphrased_nll: Tensor, perturbed_nll: Tensor) -> None:
        """Add a batch: (N,) and (N, K) mean negative log-likelihoods per token."""
        super().update(F.truth_ratio_score(F.truth_ratio(paraphrased_nll, perturbed_nll, self.form), self.direction))


class ForgetQuality(Metric):
    """p-value of a Kolmogorov–Smirnov test between truth ratios and those of a retrained model (TOFU).

    Args:
        retrained: (M,) truth ratios of the retrained model on the forget rows.
        form: of the truth ratios added, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    >>> metric = ForgetQuality(torch.tensor([0.5, 1.0]))
    >>> metric.update(torch.tensor([1.0, 1.0]), torch.tensor([[1.0], [1.7]]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, retrained: Tensor, form: F.TruthRatioForm = "geometric", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form = form
        self.retrained = retrained
        self.add_state("ratios", default=[], dist_reduce_fx="cat")

    def update(self, paraphrased_nll: Tensor, perturbed_nll: Tensor) -> None:
        """Add a batch: (N,) and (N, K) mean negative log-likelihoods per token."""
        self.ratios.append(F.truth_ratio(paraphrased_nll, perturbed_nll, self.form))

    def compute(self) -> Tensor:
        """The p-value, float64."""
        return torch.tensor(F.ks_test(dim_zero_cat(self.ratios), self.retrained)[1], dtype=torch.float64)
