"""Retain terms: what keeps the model as it is on the rows that are not to be forgotten.

To write one's own, subclass :class:`RetainTerm` and override ``__call__``; give its class path as ``retain`` of any
objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from wagle_pl.unlearning.hidden import blocks, check_layer
from wagle_pl.unlearning.streams import Answers, Streams
from wagle_pl.utilities import WagleError

if TYPE_CHECKING:
    from wagle_pl.unlearning.base import Objective


class RetainTerm:
    """One number for each retain row, to be minimised."""

    #: Whether the term needs predictions at θ₀ of the retain rows.
    logits_at_theta0: bool = False
    #: Blocks whose outputs the term reads, now and at θ₀.
    hidden_layers: tuple[int, ...] = ()

    def __call__(self, at: Streams) -> Tensor:
        """(B,), averaged over the tokens of each row. Override this."""
        raise TypeError(f"{type(self).__name__} must override __call__")

    def prepare(self, lm: Any, objective: Objective) -> None:
        """Look at the model before the run: check options that depend on it."""


class NLL(RetainTerm):
    """(1/|y|) Σ_t −log π(y_t|x): go on learning the retain rows ("GD" in the papers)."""

    def __call__(self, at: Streams) -> Tensor:
        return at["retain"].nll


class KL(RetainTerm):
    """(1/|y|) Σ_t KL(π₀(·|x, y_<t) ‖ π(·|x, y_<t)): predict what θ₀ predicts (as in TOFU, arXiv 2401.06121)."""

    logits_at_theta0 = True

    def __call__(self, at: Streams) -> Tensor:
        return kl_from_theta0(at["retain"])


class NONE(RetainTerm):
    """No retain term; no retain rows are needed."""

    def __call__(self, at: Streams) -> Tensor:
        raise WagleError("retain none has no term to compute; set retain_weight to 0")


class HiddenMSE(RetainTerm):
    """(1/|y|) Σ_t (1/d) ‖h_t − h⁰_t‖², h a block's output now and at θ₀ (RMU, arXiv 2403.03218).

    Args:
        layer: the block, counted from 0; null takes RMU's, or the middle block beside any other forget term.
    """

    def __init__(self, layer: Optional[int] = None) -> None:
        self.layer = layer

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The block."""
        return () if self.layer is None else (self.layer,)

    def prepare(self, lm: Any, objective: Objective) -> None:
        """Choose the block if none is given.

        Raises:
            WagleError: if the model lacks it, saying the range.
        """
        if self.layer is None:
            self.layer = getattr(objective, "layer", len(blocks(lm)) // 2)
        check_layer(lm, self.layer, "objective.retain.layer")

    def __call__(self, at: Streams) -> Tensor:
        answers = at["retain"]
        return answers.hidden_difference(self.layer, answers.theta0.hidden[self.layer])


def kl_from_theta0(answers: Answers) -> Tensor:
    """(B,) (1/|y|) Σ_t KL(π₀ ‖ π) over the answer tokens of each row."""
    reference, current, _ = answers.buckets
    return answers.mean_tokens(divergence(reference, current))


def divergence(reference: Tensor, current: Tensor) -> Tensor:
    """KL(π₀ ‖ π) of (..., K) log-probabilities, (...,); what has no probability under π₀ (padding of a vocabulary, with
    logits of −∞) adds nothing."""
    never = reference == -torch.inf
    pair = (logprobs.masked_fill(never, 0.0) for logprobs in (current, reference))
    return F.kl_div(*pair, reduction="none", log_target=True).sum(-1)


def cross_entropy(target: Tensor, current: Tensor) -> Tensor:
    """−Σ_v q(v) log π(v) of (..., K) probabilities q and log-probabilities, (...,); where q is 0 nothing is added."""
    return -(target * current.masked_fill(target == 0, 0.0)).sum(-1)
