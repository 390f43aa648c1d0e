"""Retain terms: what keeps the model as it is on the rows that are not to be forgotten.

To write your own, subclass :class:`RetainTerm` and override ``__call__``; give its class path as
``retain`` of any objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.errors import WagleError
from wagle_pl.core.schema import check_arguments
from wagle_pl.lm.inference import in_chunks
from wagle_pl.lm.layers import blocks, check_layer
from wagle_pl.objectives.streams import Answers, Streams


class RetainTerm(ABC):
    """One number for each retain row, to be minimised."""

    #: Whether the term is a mean over answer tokens (by ``average: tokens``, the global batch's).
    by_token: bool = False
    logits_at_theta0: bool = False  # whether it needs predictions of the retain rows at θ₀
    #: Whether the term needs logits at every position of the retain rows, not only of the answers.
    all_positions: bool = False
    hidden_layers: tuple[int, ...] = ()  # blocks whose outputs it reads, now and at θ₀

    @abstractmethod
    def __call__(self, at: Streams) -> Tensor:
        """(B,), averaged over the tokens of each row."""

    def prepare(self, lm: PreTrainedModel, layer: Optional[int] = None) -> None:  # noqa: B027
        """Look at the model, and at the block that the forget term reads, before the run."""


class NLL(RetainTerm):
    """(1/|y|) Σ_t −log π(y_t|x): go on learning the retain rows ("GD" in the papers)."""

    by_token = True

    def __call__(self, at: Streams) -> Tensor:
        return at["retain"].nll


class NONE(RetainTerm):
    """No retain term; no retain rows are needed."""

    def __call__(self, at: Streams) -> Tensor:
        raise WagleError("retain: none has no term to compute; set retain_weight to 0")


@dataclass
class KL(RetainTerm):
    """(1/|P|) Σ_{t∈P} KL(π₀(·|s_≤t) ‖ π(·|s_≤t)), at positions P of a row s of tokens.

    Args:
        positions: ``answer``: P are the positions that predict an answer token. ``batch``: every
            position of the padded batch, as in the code of TOFU (arXiv 2401.06121) and of
            OpenUnlearning (arXiv 2506.12618); the value depends on how a batch is split. (TOFU's
            code pads to a fixed length, that of OpenUnlearning and this package to the longest
            row.)
    """

    logits_at_theta0 = True

    positions: Literal["answer", "batch"] = "answer"

    def __post_init__(self) -> None:
        check_arguments(type(self).__init__, vars(self), "objective.retain.")

    @property
    def all_positions(self) -> bool:
        return self.positions != "answer"

    @property
    def by_token(self) -> bool:
        return self.positions == "answer"

    def __call__(self, at: Streams) -> Tensor:
        answers = at["retain"]
        if self.positions == "answer":
            return kl_from_theta0(answers)
        values = in_chunks(
            lambda now, then: divergence(then.log_softmax(-1), now.log_softmax(-1)),
            answers.predicted,
            answers.theta0.predicted,
        )
        return values.view(answers.labels.shape).mean(-1)


@dataclass
class HiddenMSE(RetainTerm):
    """(1/|y|) Σ_t (1/d) ‖h_t − h⁰_t‖², h a block's output, h⁰ that at θ₀ (RMU, arXiv 2403.03218).

    Args:
        layer: the block, counted from 0; null takes that of the forget term (RMU), or the middle
            one.
    """

    layer: Optional[int] = None

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return () if self.layer is None else (self.layer,)

    def prepare(self, lm: PreTrainedModel, layer: Optional[int] = None) -> None:
        if self.layer is None:
            self.layer = len(blocks(lm)) // 2 if layer is None else layer
        check_layer(lm, self.layer, "objective.retain.layer")

    def __call__(self, at: Streams) -> Tensor:
        answers = at["retain"]
        return answers.hidden_difference(self.layer, answers.theta0.hidden[self.layer])


def kl_from_theta0(answers: Answers) -> Tensor:
    """(B,) (1/|y|) Σ_t KL(π₀ ‖ π) over the answer tokens of each row."""
    values = answers.beside_theta0(lambda reference, current, _: divergence(reference, current))
    return answers.mean_tokens(values)


def divergence(reference: Tensor, current: Tensor) -> Tensor:
    """(...,) KL(π₀ ‖ π) of (..., K) log-probabilities.

    What has no probability under π₀ (padding of a vocabulary, with logits of −∞) adds nothing.
    """
    never = reference == -torch.inf
    current, reference = (logprobs.masked_fill(never, 0.0) for logprobs in (current, reference))
    return F.kl_div(current, reference, reduction="none", log_target=True).sum(-1)


def cross_entropy(target: Tensor, current: Tensor) -> Tensor:
    """(...,) −Σ_v q(v) log π(v) of (..., K) q and log π; where q is 0 nothing is added."""
    return -(target * current.masked_fill(target == 0, 0.0)).sum(-1)
