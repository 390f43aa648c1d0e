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

Options that a class does not list are those of :class:`Objective`. π is the model, π₀ the target
model, x a question, y its answer, r a refusal, |y| the answer's length in tokens, Δ the
log-probability of a whole answer now minus that at θ₀.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError, check_choice
from wagle_pl.lm.inference import in_chunks, logprobs_of
from wagle_pl.lm.layers import blocks, check_layer
from wagle_pl.objectives.objective import Objective, Schedule, Weight, as_schedule, positive
from wagle_pl.objectives.retain import RetainTerm, cross_entropy, kl_from_theta0
from wagle_pl.objectives.streams import Answers, Streams

__all__ = [
    "CEU",
    "DPO",
    "KL",
    "NPO",
    "PDU",
    "PO",
    "RMU",
    "UNDIAL",
    "WGA",
    "AltPO",
    "Answers",
    "FineTune",
    "GradAscent",
    "GradDiff",
    "L1Sparse",
    "Objective",
    "RandomLabel",
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


# -- targets for the predictions -------------------------------------------------------------------


class KL(Objective):
    """Ascent on the divergence from θ₀ on the forget rows.

    ℓ_f = −(1/|y|) Σ_t KL(π₀(·|x, y_<t) ‖ π(·|x, y_<t)).

    At θ₀ the divergence is 0 and so is its gradient: the retain term makes the first move. (TOFU's
    baseline "KL minimisation" is something else: :class:`GradAscent` with ``retain: kl``.)
    """

    by_token = True
    logits_at_theta0 = ("forget",)

    def forget_loss(self, at: Streams) -> Tensor:
        return -kl_from_theta0(at["forget"])


@dataclass
class UNDIAL(Objective):
    """Self-distillation with adjusted logits (Dong et al. 2024, arXiv 2402.10052).

    ℓ_f = −(1/|y|) Σ_t Σ_v q_t(v) log π(v|x, y_<t), q_t = softmax(z⁰_t − β·1[v = y_t]), z⁰ the
    logits at θ₀.

    Args:
        beta: β > 0: how far the true token's logit is lowered.
        positions: ``answer``: t runs over the answer tokens. ``batch``: over every position of the
            padded batch, exactly as in OpenUnlearning's code; the value depends on how a batch is
            split. Where nothing is to be predicted, that code uses the label −100 as an index: it
            lowers the logit of token V − 100.
    """

    logits_at_theta0 = ("forget",)

    beta: float = positive(10.0)
    positions: Literal["answer", "batch"] = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.positions, ("answer", "batch"), "objective.positions")

    @property
    def by_token(self) -> bool:
        return self.positions == "answer"

    @property
    def whole_streams(self) -> tuple[str, ...]:
        own = () if self.by_token else ("forget",)
        return own + super().whole_streams

    def forget_loss(self, at: Streams) -> Tensor:
        def distance(reference: Tensor, current: Tensor, label: Tensor) -> Tensor:
            lowered = reference - self.beta * F.one_hot(label, reference.shape[-1])
            return cross_entropy(lowered.softmax(-1), current)

        answers = at["forget"]
        if self.by_token:
            return answers.mean_tokens(answers.beside_theta0(distance))
        now, following = answers.everywhere, answers.labels.roll(-1, -1)
        values = in_chunks(
            lambda now, then, label: distance(then, now.log_softmax(-1), label),
            now,
            answers.theta0.everywhere,
            following.flatten() % now.vocabulary,
        )
        return values.view(following.shape)[:, :-1].mean(-1)


@dataclass
class CEU(Objective):
    """Cross-entropy to the model's own prediction without the true token (arXiv 2503.01224).

    ℓ_f = −(1/|y|) Σ_t Σ_v q_t(v) log π(v|x, y_<t), q_t = softmax(z_t, the true token's logit at −∞)
    without gradient.

    Args:
        skip_first: number of tokens to leave out at the start of each answer (the paper's footnote:
            they carry no knowledge); an answer with no other tokens counts as 0.
    """

    by_token = True

    skip_first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_first < 0:
            raise WagleError(f"objective.skip_first: must be 0 or more, got {self.skip_first}")

    def forget_loss(self, at: Streams) -> Tensor:
        def distance(logits: Tensor, label: Tensor) -> Tensor:
            target = logits.detach().scatter(1, label[:, None], -torch.inf).softmax(-1)
            return cross_entropy(target, logits.log_softmax(-1))

        answers = at["forget"]
        values = in_chunks(distance, answers.predicted, answers.targets)
        counted = (answers.mask.cumsum(-1) > self.skip_first)[answers.mask]
        kept = (answers.length - self.skip_first).clamp(min=1)
        return answers.mean_tokens(values * counted) * answers.length / kept


@dataclass
class RandomLabel(Objective):
    """Learn random tokens as the answer, as SalUn's baseline does for classes (arXiv 2310.12508).

    ℓ_f = (1/|y|) Σ_t −log π(u_t|x, y_<t), u_t uniform over the vocabulary, drawn anew for each row
    and epoch.

    Args:
        seed: of the draws.
    """

    by_token = True

    seed: int = 0

    def forget_loss(self, at: Streams) -> Tensor:
        answers = at["forget"]
        vocabulary = answers.predicted.vocabulary
        drawn = [
            torch.randint(vocabulary, (length,), generator=_generator(self.seed, at.epoch, row))
            for row, length in zip(answers.rows.tolist(), answers.length.tolist(), strict=True)
        ]
        labels = torch.cat(drawn).to(answers.labels.device)
        return answers.mean_tokens(-in_chunks(logprobs_of, answers.predicted, labels))


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone: the same draws on any device, in any batch."""
    return torch.Generator().manual_seed(stable_seed(*key))


@dataclass
class PDU(Objective):
    """Flat predictions while a bound holds on the retain loss (arXiv 2506.05314): primal-dual.

    Minimise ℓ_f = (1/|y|) Σ_t (max_v z_t(v) − (1/V) Σ_v z_t(v))², z the logits, subject to ℓ_r ≤ ε:
    a step descends ℓ_f + λ ℓ_r, and then λ ← max(0, λ + η (ℓ_r − ε)), ℓ_r over the global batch.
    λ begins as ``retain_weight``; ℓ_f is as large as squared logits, so OpenUnlearning's runs begin
    at 50 to 100. (Its code takes the logits one position later, logs λ (ℓ_r − ε) in place of λ ℓ_r,
    and updates λ after each micro-batch, on each device alone.)

    Args:
        epsilon: ε > 0, somewhat more than the retain loss at θ₀ (0.3 in OpenUnlearning's runs on
            TOFU).
        dual_step: η > 0.
        dual_warmup: epochs in which λ stays as it is.
    """

    by_token = True

    epsilon: float = field(metadata={"positive": True})
    dual_step: float = positive(1.0)
    dual_warmup: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.retain_weight, (str, Schedule)) or not self.retain_weight > 0:
            raise WagleError(
                "the dual weight begins there: give a number above 0, and a retain term",
                option="objective.retain_weight",
            )
        self.dual = float(self.retain_weight)

    def forget_loss(self, at: Streams) -> Tensor:
        def margin(logits: Tensor) -> Tensor:
            never = logits == -torch.inf  # padding of a vocabulary
            mean = logits.masked_fill(never, 0.0).sum(-1) / (~never).sum(-1)
            return (logits.amax(-1) - mean).square()

        answers = at["forget"]
        return answers.mean_tokens(in_chunks(margin, answers.predicted))

    def weights(self, at: Streams) -> dict[str, float]:
        return super().weights(at) | {"retain_loss": self.dual}

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        return super().__call__(at) | {"dual": torch.tensor(self.dual)}

    def after_step(self, losses: Mapping[str, float], epoch: int) -> None:
        if epoch >= self.dual_warmup:
            violation = losses["retain_loss"] - self.epsilon
            self.dual = max(0.0, self.dual + self.dual_step * violation)

    def state_dict(self) -> dict[str, float]:
        return {"dual": self.dual}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.dual = state.get("dual", self.dual)


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

    layer: int = 7
    steering: float = positive(20.0)
    seed: int = 0
    trainable: str = field(default="auto", kw_only=True)
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
        direction = torch.rand(dimension, generator=_generator(self.seed, dimension))
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
