"""Objectives: a forget term plus a retain term, per example.

To write your own, subclass :class:`Objective` and override ``forget_loss``; give its class path as
``--model.objective``::

    @dataclass
    class Flat(Objective):
        target: float = 5.0

        def forget_loss(self, at):
            return (at["forget"].nll - self.target) ** 2  # push the loss there, no further

Every term returns one number per example, averaged over its tokens, and the loss is the mean over
rows. Where a paper averages over the tokens of a batch, ``average: tokens`` averages over those of
the global batch, so that a step never depends on how its batch is split. All terms are minimised: a
term that ascends includes a minus sign.

Objectives that give a target for the predictions are in :mod:`.targets`. Options that a class does
not list are those of :class:`Objective`. π is the model, π₀ the target model, x a question, y its
answer, r a refusal, |y| the answer's length in tokens, Δ the log-probability of a whole answer now
minus that at θ₀.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.lm.layers import blocks, check_layer
from wagle_pl.objectives.objective import Objective, Weight, as_schedule, positive
from wagle_pl.objectives.retain import RetainTerm
from wagle_pl.objectives.streams import Answers, Streams

__all__ = [
    "DPO",
    "NPO",
    "PO",
    "RMU",
    "WGA",
    "AltPO",
    "Answers",
    "FineTune",
    "GradAscent",
    "GradDiff",
    "L1Sparse",
    "Objective",
    "SatImp",
    "SimNPO",
    "Streams",
]


# -- ascent on the answers -------------------------------------------------------------------------


class GradDiff(Objective):
    """Gradient difference: ascend the forget rows' loss, descend the retain rows'.

    ℓ = −NLL(forget) + λ NLL(retain) (Liu et al. 2022, arXiv 2203.12817; as in TOFU, arXiv
    2401.06121).
    """

    by_token = True

    def forget_loss(self, at: Streams) -> Tensor:
        return -at["forget"].nll


@dataclass
class GradAscent(GradDiff):
    """Gradient ascent on the forget rows alone (Jang et al. 2022, arXiv 2210.01504).

    ℓ_f = −NLL(forget), and no retain term unless one is given: ``retain: kl`` gives TOFU's baseline
    "KL minimisation" over answer tokens; with its ``positions: batch``, as in TOFU's code.
    """

    retain: Union[RetainTerm, str] = "none"


@dataclass
class WGA(Objective):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): likely tokens weigh more.

    ℓ_f = (1/|y|) Σ_t w_t log π(y_t|x), w_t = π(y_t|x)^β without gradient.

    Args:
        beta: β > 0; towards 0 the term becomes gradient ascent.
    """

    by_token = True

    beta: float = positive(1.0)

    def forget_loss(self, at: Streams) -> Tensor:
        answers = at["forget"]
        logprobs = answers.token_logprobs
        return ((self.beta * logprobs.detach()).exp() * logprobs).sum(-1) / answers.length


@dataclass
class SatImp(Objective):
    """Ascent weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

    ℓ_f = (1/|y|) Σ_t w_t log π(y_t|x), w_t = π(y_t|x)^β₁ (1 − π(y_t|x))^β₂ without gradient.

    Args:
        beta1: β₁ > 0, saturation: tokens that are already unlikely weigh less.
        beta2: β₂ > 0, importance: tokens that are nearly certain weigh less.
    """

    by_token = True

    beta1: float = positive(5.0)
    beta2: float = positive(1.0)

    def forget_loss(self, at: Streams) -> Tensor:
        answers = at["forget"]
        logprobs = answers.token_logprobs
        now = logprobs.detach()
        importance = (-torch.expm1(now)).clamp(min=0).pow(self.beta2)
        return ((self.beta1 * now).exp() * importance * logprobs).sum(-1) / answers.length


# -- preferences -----------------------------------------------------------------------------------


@dataclass
class NPO(Objective):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

    ℓ_f = −(2/β) log σ(−β Δ_y), bounded below where gradient ascent is not.

    Args:
        beta: β > 0; towards 0 the term becomes gradient ascent.
        reduction: ``sum`` takes log-probabilities of whole answers, as the paper does; ``mean``
            takes their mean per token, as WAGLE's code does of a batch of one row (of more rows, it
            puts one mean over all their tokens into σ). MUSE's code does neither: it applies the
            formula to every raw logit in place of log-probabilities, and averages.
    """

    references = ("forget",)

    beta: float = positive(0.1)
    reduction: Literal["sum", "mean"] = "sum"

    def forget_loss(self, at: Streams) -> Tensor:
        answers = at["forget"]
        change = answers.logprob - answers.reference
        if self.reduction == "mean":
            change = change / answers.length
        return -2 / self.beta * F.logsigmoid(-self.beta * change)


@dataclass
class SimNPO(Objective):
    """NPO without a reference, by token (Fan et al. 2024, arXiv 2410.07163).

    ℓ_f = −(2/β) log σ(−(β/|y|) log π(y|x) − γ).

    Args:
        beta: β > 0.
        gamma: margin γ inside the sigmoid. The paper's code and OpenUnlearning multiply their
            margin by β: it equals γ/β here.
    """

    beta: float = positive(2.5)
    gamma: float = 0.0

    def forget_loss(self, at: Streams) -> Tensor:
        return -2 / self.beta * F.logsigmoid(self.beta * at["forget"].nll - self.gamma)


class PO(Objective):
    """Preference optimisation: refusals as answers (TOFU's "IDK", OpenUnlearning's ``IdkNLL``).

    ℓ_f = NLL(refusal | forget question), a refusal drawn for each row and epoch (arXiv 2401.06121).
    """

    by_token = True
    forget_streams = ("refusal",)

    def forget_loss(self, at: Streams) -> Tensor:
        return at["refusal"].nll


@dataclass
class DPO(Objective):
    """Direct preference optimisation of a refusal over the answer (arXiv 2305.18290).

    ℓ_f = −(2/β) log σ(β (Δ_r − Δ_y)), with the factor of arXiv 2404.05868.

    The refusal of a row is the same in every epoch, so that one number per row at θ₀ is enough.

    Args:
        beta: β > 0.
    """

    forget_streams = ("forget", "refusal")
    references = ("forget", "refusal")

    beta: float = positive(0.1)

    def forget_loss(self, at: Streams) -> Tensor:
        answer, preferred = (at[s].logprob - at[s].reference for s in self.forget_streams)
        return -2 / self.beta * F.logsigmoid(self.beta * (preferred - answer))


class AltPO(DPO):
    """DPO of an alternate answer over the one to forget (arXiv 2409.13474).

    ℓ_f = −(2/β) log σ(β (Δ_a − Δ_y)), a the text in the column ``alternate``: in the paper the
    target model writes five wrong but plausible answers, each of which is a row.
    """

    forget_streams = references = ("forget", "alternate")


# -- hidden states ---------------------------------------------------------------------------------


#: The names that models give to the down-projection of an MLP, or of its experts; a regular
#: expression.
_DOWN_PROJECTION = (
    r"(?:(?:mlp|ffn|feed_forward|block_sparse_moe)\.(?:\w+\.)*)?"
    r"(?:down_proj|c_proj|dense_4h_to_h|fc2|fc_out|w2)(?:\.|$)"
)


@dataclass
class RMU(Objective):
    """Representation misdirection of a block's output (Li et al. 2024, arXiv 2403.03218).

    ℓ_f = (1/|y|) Σ_t (1/d) ‖h_t − c·u‖², h the block's output (d numbers per token), u a fixed
    random unit vector with entries of one sign. The retain term keeps the same output unchanged
    (``hidden_mse``). (OpenUnlearning's code divides each row's sum by every row's length and
    averages over all pairs: the same for answers of one length.)

    Args:
        layer: the block, counted from 0.
        steering: c, the length of the target vector.
        seed: of u.
        trainable: regular expression; only parameters whose names contain a match move. ``auto``,
            as in the paper: the MLP's down-projection of the block and of the two before it.
    """

    layer: int = 7  # type: ignore[misc]
    steering: float = positive(20.0)
    seed: int = 0
    trainable: str = field(default="auto", kw_only=True)  # type: ignore[misc]
    retain: Union[RetainTerm, str] = field(default="hidden_mse", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable == "auto":
            near = "|".join(str(i) for i in range(max(0, self.layer - 2), self.layer + 1))
            self.trainable = rf"\.(?:layers|h|blocks)\.(?:{near})\.{_DOWN_PROJECTION}"
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise WagleError(
                f"objective.trainable: {self.trainable!r} is not a regular expression: {error}"
            ) from None

    def prepare(self, lm: PreTrainedModel) -> None:
        check_layer(lm, self.layer, "objective.layer")
        super().prepare(lm)
        if not any(re.search(self.trainable, name) for name, _ in lm.named_parameters()):
            block = blocks(lm)[self.layer].named_parameters()
            names = [name for name, parameter in block if parameter.ndim > 1]
            raise WagleError(
                f"objective.trainable: {self.trainable!r} matches no parameter of this model; block "
                f"{self.layer} has {', '.join(names)}"
            )

    def forget_loss(self, at: Streams) -> Tensor:
        answers = at["forget"]
        hidden = answers.hidden[self.layer]
        control = self.control(hidden.shape[-1]).to(hidden.device)
        return answers.hidden_difference(self.layer, control)

    def control(self, dimension: int) -> Tensor:
        """(d,) c·u in fp32, the same for one seed."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, dimension))
        direction = torch.rand(dimension, generator=generator)
        return self.steering * direction / torch.linalg.vector_norm(direction)


# -- the retain rows alone -------------------------------------------------------------------------


class FineTune(Objective):
    """Train on the retain rows, and trust that the rest fades (arXiv 1911.04933).

    ℓ = NLL(retain). An epoch is one pass over the retain rows.
    """

    forget_streams = ()

    def forget_loss(self, at: Streams) -> Tensor:
        raise TypeError("there is no forget term")


@dataclass
class L1Sparse(FineTune):
    """Fine-tuning towards a sparse model, which forgets more (Jia et al. 2023, arXiv 2304.04934).

    ℓ = NLL(retain) + α ‖θ‖₁, over the weights that may move.

    Args:
        alpha: α: a number, or a schedule; the paper's decays to 0: ``linear:1e-5->0``.
    """

    alpha: Weight = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._alpha_schedule = as_schedule(self.alpha, "objective.alpha")

    def penalty(self, at: Streams) -> Tensor:
        norms = [p.abs().sum(dtype=torch.float32) for p in at.lm.parameters() if p.requires_grad]
        return self._alpha_schedule(at.progress) * torch.stack(norms).sum()
