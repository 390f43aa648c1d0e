"""Objectives that give the predictions on the forget rows a target; see :mod:`.forget`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.lm.inference import in_chunks, logprobs_of
from wagle_pl.objectives.objective import Objective, Schedule, positive
from wagle_pl.objectives.retain import cross_entropy, kl_from_theta0
from wagle_pl.objectives.streams import Streams

__all__ = ["CEU", "KL", "PDU", "UNDIAL", "RandomLabel"]


class KL(Objective):
    """Ascent on the divergence from θ₀ on the forget rows.

    ℓ_f = −(1/|y|) Σ_t KL(π₀(·|x, y_<t) ‖ π(·|x, y_<t)).

    At θ₀ the divergence is 0 and so is its gradient: the retain term makes the first move. (TOFU's
    baseline "KL minimisation" is something else: :class:`GradAscent` with ``retain: kl``.)
    """

    by_token = True
    logits_at_theta0 = True

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

    logits_at_theta0 = True

    beta: float = positive(10.0)
    positions: Literal["answer", "batch"] = "answer"

    @property
    def by_token(self) -> bool:
        return self.positions == "answer"

    @property
    def whole_streams(self) -> tuple[str, ...]:
        streams = () if self.by_token else ("forget",)
        return streams + super().whole_streams

    def forget_loss(self, at: Streams) -> Tensor:
        def distance(reference: Tensor, current: Tensor, label: Tensor) -> Tensor:
            lowered = reference - self.beta * F.one_hot(label, reference.shape[-1])
            return cross_entropy(lowered.softmax(-1), current)

        answers = at["forget"]
        if self.by_token:
            return answers.mean_tokens(answers.beside_theta0(distance))
        following = answers.labels.roll(-1, -1)
        values = in_chunks(
            lambda now, then, label: distance(then, now.log_softmax(-1), label),
            answers.predicted,
            answers.theta0.predicted,
            following.flatten() % answers.predicted.vocabulary,
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

    skip_first: int = 1  # type: ignore[misc]

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
        counted = F.pad(answers.mask.cumsum(-1) > self.skip_first, (0, 1)).take(answers.places)
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
        vocabulary, drawn = answers.predicted.vocabulary, []
        for row, length in torch.stack([answers.rows, answers.length], 1).tolist():
            generator = torch.Generator().manual_seed(stable_seed(self.seed, at.epoch, row))
            drawn.append(torch.randint(vocabulary, (length,), generator=generator))
        labels = torch.cat(drawn).to(answers.labels.device)
        return answers.mean_tokens(-in_chunks(logprobs_of, answers.predicted, labels))


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
