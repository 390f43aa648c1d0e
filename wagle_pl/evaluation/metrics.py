"""torchmetrics around the functionals: update with a batch, compute over everything seen, on any number of ranks.

A mean of one value an example is a ``MeanMetric``: its state is a sum and a count, which ranks add up. What needs all
examples at once keeps them in lists, which ranks put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.classifiers import ToxicityClassifier, nearest_answer


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
        super().update(
            F.answer_probability(nll) if other_nll is None else F.option_probability(nll, other_nll)
        )


class NearestOption(MeanMetric):
    """Share of rows whose right answer is the likeliest of the options, by likelihood per token.

    >>> metric = NearestOption()
    >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [2.0]]))
    >>> metric.compute()
    tensor(0.5000)
    """

    def update(self, nll: Tensor, other_nll: Tensor) -> None:
        """Add a batch: (N,) and (N, K) mean negative log-likelihoods per token."""
        super().update(F.nearest_option(nll, other_nll))


class NearestAnswer(MeanMetric):
    """Share of generations that are nearest to the right answer by sentence embedding (WAGLE's accuracy)."""

    def update(self, generations: Tensor, options: Tensor) -> None:
        """Add a batch: (N, D) embeddings of generations, and (N, K, D) of the options, the right answer's first."""
        super().update(
            torch.tensor(
                [float(nearest_answer(g, o)) for g, o in zip(generations, options, strict=True)]
            )
        )


class ChoiceAccuracy(MeanMetric):
    """Accuracy of multiple choice by log-probability."""

    higher_is_better = True

    def update(self, logprobs: Tensor, label: Tensor) -> None:
        """Add a batch: (N, K) summed log-probabilities of the choices, and (N,) indices of the right ones."""
        super().update(F.choice_accuracy(logprobs, label))


class Rouge(MeanMetric):
    """Mean ROUGE recall or F1 of generations.

    Args:
        measure: ``rougeL_recall``, ``rouge1_recall``, ``rougeL_f1`` or ``rouge1_f1``.
        stem: reduce words to their stems.

    >>> metric = Rouge()
    >>> metric.update(["the cat sat"], ["the cat sat down"])
    >>> round(metric.compute().item(), 2)
    0.75
    """

    higher_is_better = True

    def __init__(self, measure: str = "rougeL_recall", stem: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.measure = measure
        self.stem = stem

    def update(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of generations and their references."""
        super().update(F.rouge(predictions, targets, self.stem)[self.measure])


class Memorization(Rouge):
    """MUSE's verbatim and knowledge memorisation in percent: ROUGE-L F1, without stemming.

    Args:
        stops: a generation counts up to the first of them; knowledge memorisation has
            ``("\\n\\n", "\\nQuestion", "Question:")``, verbatim memorisation none.
    """

    higher_is_better = False

    def __init__(self, stops: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__("rougeL_f1", stem=False, **kwargs)
        self.stops = tuple(stops)

    def update(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of generations and their references."""
        super().update([F.prefix_before(text, self.stops) for text in predictions], targets)

    def compute(self) -> Tensor:
        """The mean in percent."""
        return 100 * super().compute()


class Bleu(MeanMetric):
    """Mean sentence BLEU, 0 to 100."""

    higher_is_better = True

    def update(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of generations and their references."""
        super().update(F.bleu(predictions, targets))


class ContainsAnswer(MeanMetric):
    """Share of generations that contain the answer."""

    higher_is_better = True

    def update(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of generations and their references."""
        super().update(F.contains_answer(predictions, targets))


class Fluency(MeanMetric):
    """Mean over generations of what tells language from noise; those that do not define it are left out.

    Args:
        measure: ``ngram_entropy``, ``repetition`` or ``degenerate``.

    >>> metric = Fluency("repetition")
    >>> metric.update(["a b c d", "no"])
    >>> metric.compute()
    tensor(0.)
    """

    def __init__(
        self,
        measure: Literal["ngram_entropy", "repetition", "degenerate"] = "ngram_entropy",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.measure = getattr(F, measure)

    def update(self, texts: Sequence[str]) -> None:
        """Add a batch of generations."""
        for text in texts:
            try:
                super().update(float(self.measure(text)))
            except F.Undefined:
                continue


class Toxicity(MeanMetric):
    """Mean toxicity of texts in [0, 1].

    Args:
        classifier: folder or hub id, see :class:`~wagle_pl.evaluation.classifiers.ToxicityClassifier`.
    """

    higher_is_better = False

    def __init__(self, classifier: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classify = ToxicityClassifier(classifier)

    def update(self, texts: Sequence[str]) -> None:
        """Add a batch of texts."""
        super().update(torch.tensor(self.classify(texts)))


class Memorized(MeanMetric):
    """Mean exact memorisation or extraction strength of answers.

    Args:
        measure: ``exact_memorization`` or ``extraction_strength``.

    >>> metric = Memorized("extraction_strength")
    >>> metric.update([[False, True, True, True], [True, True]])
    >>> metric.compute()
    tensor(0.8750)
    """

    def __init__(
        self,
        measure: Literal["exact_memorization", "extraction_strength"] = "exact_memorization",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.measure = getattr(F, measure)

    def update(self, greedy: Sequence[Sequence[bool]]) -> None:
        """Add a batch: for each answer whether each of its tokens is the most probable one."""
        super().update(torch.tensor([self.measure(row) for row in greedy]))


class TruthRatio(MeanMetric):
    """Mean truth ratio as a score in [0, 1].

    Args:
        direction: ``true_better`` for rows to keep, ``closer_to_1`` for rows to forget, ``prob_mean``; see
            :func:`wagle_pl.evaluation.functional.truth_ratio_score`.
        form: ``geometric`` or ``arithmetic``, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    >>> metric = TruthRatio("true_better")
    >>> metric.update(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]))
    >>> metric.compute()
    tensor(0.)
    """

    higher_is_better = True

    def __init__(
        self,
        direction: Literal["closer_to_1", "true_better", "prob_mean"] = "true_better",
        form: F.TruthRatioForm = "geometric",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.direction = direction
        self.form = form

    def update(self, paraphrased_nll: Tensor, perturbed_nll: Tensor) -> None:
        """Add a batch: (N,) and (N, K) mean negative log-likelihoods per token."""
        super().update(
            F.truth_ratio_score(
                F.truth_ratio(paraphrased_nll, perturbed_nll, self.form), self.direction
            )
        )


class _Metric(Metric):
    is_differentiable = False
    full_state_update = False


class Perplexity(_Metric):
    """Perplexity of a corpus, from the negative log-likelihoods of its texts."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nll_sum", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll_sum: Tensor, count: Tensor) -> None:
        """Add a batch: (N,) summed negative log-likelihoods, and (N,) numbers of tokens (or words)."""
        self.nll_sum += nll_sum.double().sum()
        self.count += count.double().sum()

    def compute(self) -> Tensor:
        """The perplexity, float64."""
        return F.perplexity(self.nll_sum[None], self.count[None])


class ForgetQuality(_Metric):
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

    def __init__(
        self, retrained: Tensor, form: F.TruthRatioForm = "geometric", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.form = form
        self.retrained = retrained
        self.add_state("ratios", default=[], dist_reduce_fx="cat")

    def update(self, paraphrased_nll: Tensor, perturbed_nll: Tensor) -> None:
        """Add a batch: (N,) and (N, K) mean negative log-likelihoods per token."""
        self.ratios.append(F.truth_ratio(paraphrased_nll, perturbed_nll, self.form))

    def compute(self) -> Tensor:
        """The p-value, float64."""
        return torch.tensor(
            F.ks_test(dim_zero_cat(self.ratios), self.retrained)[1], dtype=torch.float64
        )


class MembershipInference(_Metric):
    """Area under the ROC curve of a membership inference attack, or MUSE's privacy leakage by it.

    The scores are those of :mod:`wagle_pl.evaluation.functional.membership`, low for a member.

    Args:
        retrained_auc: the area on the retrained model; with it, compute gives the privacy leakage in percent.

    >>> metric = MembershipInference()
    >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, retrained_auc: Optional[float] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.retrained_auc = retrained_auc
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("members", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, members: Tensor) -> None:
        """Add a batch: (N,) scores, and (N,) bool, whether the text was among the training data."""
        self.scores.append(scores)
        self.members.append(members)

    def compute(self) -> Tensor:
        """The area, or the leakage, float64."""
        scores, members = dim_zero_cat(self.scores), dim_zero_cat(self.members).bool()
        found = F.membership_auc(scores[members], scores[~members])
        if self.retrained_auc is not None:
            found = F.privacy_leakage(found, self.retrained_auc)
        return torch.tensor(found, dtype=torch.float64)


class HarmonicMean(_Metric):
    """Harmonic mean of all values added; TOFU's model utility is that of nine measures.

    >>> metric = HarmonicMean()
    >>> metric.update(torch.tensor([1.0, 0.5]))
    >>> metric.compute()
    tensor(0.6667)
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values, (N,)."""
        self.values.append(values)

    def compute(self) -> Tensor:
        """The harmonic mean."""
        return F.harmonic_mean(dim_zero_cat(self.values))


class UnlearningEfficacy(MeanMetric):
    """WAGLE's UE average, of measures that grow with forgetting and of what the model still knows."""

    higher_is_better = True

    def update(self, forgotten: Sequence[float], remaining: Sequence[float] = ()) -> None:
        """Add terms; one minus each of ``remaining`` enters."""
        super().update(torch.tensor([*forgotten, *(1 - value for value in remaining)]))
