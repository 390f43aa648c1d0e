"""Objectives: a forget term plus a retain term, per example.

To write one's own, subclass :class:`Objective` and override ``forget_loss``; give its class path as
``--model.objective``::

    class Flat(Objective):
        def forget_loss(self, at):
            return (at["forget"].nll - 5.0) ** 2  # push the loss to 5, no further

Every term returns one number an example, averaged over the tokens of that example and never over the tokens of a batch:
that is what makes a step independent of how its batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, Optional

import torch.nn.functional as F
from torch import Tensor

from wagle_pl.evaluation.likelihood import token_logprobs
from wagle_pl.utilities import WagleError


class Answers:
    """What a model says about the answers of one stream's batch, computed when asked for.

    Attributes:
        logits: (B, T, V).
        labels: (B, T), -100 where nothing is to be predicted.
        reference: (B,) summed log-probability at θ₀; None unless the objective lists the stream in ``references``.
    """

    def __init__(self, logits: Tensor, labels: Tensor, reference: Optional[Tensor] = None) -> None:
        self.logits = logits
        self.labels = labels
        self.reference = reference

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.logits, self.labels)

    @property
    def token_logprobs(self) -> Tensor:
        """(B, T − 1) log-probability of each answer token in fp32, 0 elsewhere."""
        return self._tokens[0]

    @property
    def mask(self) -> Tensor:
        """(B, T − 1) bool: where an answer token is predicted."""
        return self._tokens[1]

    @cached_property
    def length(self) -> Tensor:
        """(B,) number of answer tokens."""
        return self.mask.sum(-1)

    @cached_property
    def logprob(self) -> Tensor:
        """(B,) summed log-probability of the answer, log π(y|x)."""
        return self.token_logprobs.sum(-1)

    @cached_property
    def nll(self) -> Tensor:
        """(B,) mean negative log-likelihood per answer token."""
        return -self.logprob / self.length


class Streams(Mapping[str, Answers]):
    """Streams of one batch; the model runs on a stream when an objective first asks for it.

    Args:
        batch: stream -> tensors, as the data module makes them.
        run: tensors of one stream -> (logits, labels).
        references: stream -> (rows of the set,) summed log-probabilities at θ₀.
    """

    def __init__(
        self,
        batch: Mapping[str, Mapping[str, Tensor]],
        run: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]],
        references: Mapping[str, Tensor],
    ) -> None:
        self._batch = batch
        self._run = run
        self._references = references
        self._answers: dict[str, Answers] = {}

    def __getitem__(self, stream: str) -> Answers:
        if stream not in self._answers:
            tensors = self._batch[stream]
            logits, labels = self._run(tensors)
            reference = self._references.get(stream)
            if reference is not None:
                reference = reference.to(tensors["row"].device)[tensors["row"]]
            self._answers[stream] = Answers(logits, labels, reference)
        return self._answers[stream]

    def __iter__(self):
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)

    def mean(self, stream: str, values: Tensor) -> Tensor:
        """Weighted sum of (B,) values: the mean over the global batch once ranks and micro-batches are averaged."""
        weight = self._batch[stream]["weight"].to(values.dtype)
        return (weight * values.masked_fill(weight == 0, 0.0)).sum()


class Objective:
    """``forget_weight`` × forget term + ``retain_weight`` × retain term.

    Args:
        forget_weight: factor of the forget term.
        retain_weight: factor of the retain term; 0 leaves it out (no retain rows are needed then).
    """

    #: Streams the forget term reads: ``forget``, ``refusal`` (the same rows, answered by a refusal).
    forget_streams: tuple[str, ...] = ("forget",)
    #: Streams whose log-probabilities at θ₀ the objective needs.
    references: tuple[str, ...] = ()

    def __init__(self, forget_weight: float = 1.0, retain_weight: float = 1.0) -> None:
        self.forget_weight = forget_weight
        self.retain_weight = retain_weight

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of a training batch; the first sets the epoch's length."""
        return self.forget_streams + (("retain",) if self.retain_weight else ())

    def forget_loss(self, at: Streams) -> Tensor:
        """The forget term: (B,), one number for each row of the first forget stream. Override this."""
        raise TypeError(f"{type(self).__name__} must override forget_loss")

    def retain_loss(self, at: Streams) -> Tensor:
        """The retain term: (B,), by default the mean negative log-likelihood per token."""
        return at["retain"].nll

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        """``loss``, ``forget_loss`` and ``retain_loss`` of a batch, scalars."""
        losses = {"forget_loss": at.mean(self.forget_streams[0], self.forget_loss(at))}
        loss = self.forget_weight * losses["forget_loss"]
        if self.retain_weight:
            losses["retain_loss"] = at.mean("retain", self.retain_loss(at))
            loss = loss + self.retain_weight * losses["retain_loss"]
        return {"loss": loss, **losses}


class GradDiff(Objective):
    """Gradient difference: ascend the loss of the forget rows, descend that of the retain rows.

    ℓ = −NLL(forget) + λ NLL(retain) (Liu et al. 2022, arXiv 2203.12817; as in TOFU, arXiv 2401.06121).

    Args:
        forget_weight: factor of the forget term.
        retain_weight: λ.
    """

    def forget_loss(self, at: Streams) -> Tensor:
        """−(1/|y|) Σ_t −log π(y_t|x)."""
        return -at["forget"].nll


class NPO(Objective):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

    ℓ_f = −(2/β) log σ(−β log(π(y|x) / π₀(y|x))), bounded below where gradient ascent is not.

    Args:
        beta: β > 0; towards 0 the term becomes gradient ascent.
        reduction: ``sum`` takes log-probabilities of whole answers, as the paper does; ``mean`` takes their mean per
            token, as the code of WAGLE and MUSE does.
        forget_weight: factor of the forget term.
        retain_weight: factor of the retain term.

    Raises:
        WagleError: if β is not positive.
    """

    references = ("forget",)

    def __init__(self, beta: float = 0.1, reduction: Literal["sum", "mean"] = "sum", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if beta <= 0:
            raise WagleError(f"objective.beta must be above 0, got {beta}")
        self.beta = beta
        self.reduction = reduction

    def forget_loss(self, at: Streams) -> Tensor:
        """−(2/β) log σ(−β Δ), Δ the log-probability now minus that at θ₀."""
        answers = at["forget"]
        change = answers.logprob - answers.reference
        if self.reduction == "mean":
            change = change / answers.length
        return -2 / self.beta * F.logsigmoid(-self.beta * change)


class PO(Objective):
    """Preference optimisation: answer the forget questions with a refusal (TOFU, arXiv 2401.06121, "IDK").

    ℓ_f = NLL(refusal | forget question), a refusal drawn for each row and epoch.

    Args:
        forget_weight: factor of the forget term.
        retain_weight: factor of the retain term.
    """

    forget_streams = ("refusal",)

    def forget_loss(self, at: Streams) -> Tensor:
        """(1/|r|) Σ_t −log π(r_t|x)."""
        return at["refusal"].nll
