"""Step rules: change the objective's gradient, from its terms or by more passes over a step's rows.

To write your own, subclass :class:`StepRule` and override ``gradient``; give its class path as
``--model.step_rule``::

    class Orthogonal(StepRule):
        def gradient(self, step):
            forget, retain = step.gradients["forget_loss"], step.gradients["retain_loss"]
            along = dot(forget, retain) / dot(retain, retain)
            return step.total(forget_loss={n: g - along * retain[n] for n, g in forget.items()})

A rule sees gradients of the selected weights over the global batch, so that a step does not depend
on how its batch is split. ℓ_f and ℓ_r are the terms of the objective, with their weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.objectives import Objective, Streams

#: Name of a tensor -> the gradient of its selected weights, of their shape.
Gradients = dict[str, Tensor]
_EXACT = 256  # up to this many rows or columns, singular vectors are not approximated
Loss = Union[str, Callable[[Streams], Tensor]]


@dataclass(eq=False)
class Step:
    """An optimiser step, once all its backward passes are done."""

    number: int  # counted from 0
    values: Mapping[str, Tensor]  # name of a tensor -> its selected weights
    #: Term of the objective (``forget_loss``, ``retain_loss``, ``penalty``) -> its gradient.
    gradients: Mapping[str, Gradients]
    #: Does one more forward pass over the step's rows, at the current values, and a backward pass
    #: for each loss: a term, or a scalar of a micro-batch, as :meth:`.Streams.mean` returns it.
    again: Callable[..., list[Gradients]]
    #: (name, its selected weights) -> its whole tensor, 0 outside the mask; and back.
    dense: Callable[[str, Tensor], Tensor] = lambda _, selected: selected
    selected: Callable[[str, Tensor], Tensor] = lambda _, dense: dense

    def total(self, **other: Gradients) -> Gradients:
        """The gradient of the objective, with some of its terms replaced."""
        terms = ({**self.gradients, **other}).values()
        return {name: torch.stack([term[name] for term in terms]).sum(0) for name in self.values}

    @contextmanager
    def at(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Use other values inside the context; restore the former ones after it, bit for bit."""
        kept = {name: value.clone() for name, value in self.values.items()}
        try:
            for name, value in self.values.items():
                value.copy_(values[name])
            yield
        finally:
            for name, value in self.values.items():
                value.copy_(kept[name])


def dot(left: Gradients, right: Gradients) -> Tensor:
    """The scalar product of two gradients, in fp32."""
    return torch.stack([(left[name].float() * right[name].float()).sum() for name in left]).sum()


def norm(gradient: Gradients) -> Tensor:
    """The 2-norm of a gradient; always above 0, for divisions."""
    return dot(gradient, gradient).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


class StepRule(ABC):
    """Turns the gradients of the objective's terms into the one that the optimiser gets."""

    @abstractmethod
    def gradient(self, step: Step) -> Gradients:
        """The gradient for the optimiser, clipped like any other. Called without autograd."""

    def check(self, objective: Objective) -> None:
        if not objective.forget_streams:
            raise WagleError(
                f"step_rule: {type(self).__name__} needs a forget term, and objective "
                f"{type(objective).__name__} has none"
            )

    def state_dict(self) -> dict[str, Any]:
        """State that is kept between steps, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the state."""


@dataclass
class SAM(StepRule):
    """Sharpness-aware minimisation of the forget term (arXiv 2502.05374).

    g = ∇ℓ_f(θ + ρ ∇ℓ_f(θ)/‖∇ℓ_f(θ)‖) + ∇ℓ_r(θ), with norm and shift over selected weights only.

    Costs one more pass over the forget rows, and 12 more bytes per selected weight.

    Args:
        rho: ρ, how far the selected weights are shifted.
    """

    rho: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self.rho, "step_rule.rho")

    def gradient(self, step: Step) -> Gradients:
        forget = step.gradients["forget_loss"]
        scale = self.rho / norm(forget)
        with step.at({name: v + scale * forget[name] for name, v in step.values.items()}):
            (shifted,) = step.again("forget_loss")
        return step.total(forget_loss=shifted)


@dataclass
class MUDMAN(StepRule):
    """Unlearn what an adversary has relearned, where that does not disrupt (arXiv 2506.12484).

    r ← μr + (1 − μ)∇ℓ_r(θ), u = ∇ℓ_f(φ), g = r + u/‖u‖ ⊙ 1[sign r = sign u], and the adversary
    φ ← φ − η_φ ∇NLL_forget(φ), which is reset to θ every ``fork_every`` steps.

    As in the paper's code (MUDMAN.py at commit 36241eb) with ``--optimizer SGD`` at the unlearning
    rate, without clipping, and ``retain_weight`` = retaining rate / unlearning rate.
    ``forget_weight`` has no effect: u is normalised. Costs one more pass over the forget rows, and
    16 more bytes per selected weight, 8 of them in checkpoints.

    Args:
        fork_every: steps from one copy of θ to the next.
        adversary_lr: η_φ.
        momentum: μ of the retain gradient.
    """

    fork_every: int = 32
    adversary_lr: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_positive(self.fork_every, "step_rule.fork_every")
        check_positive(self.adversary_lr, "step_rule.adversary_lr")
        if not 0 <= self.momentum < 1:
            raise WagleError(f"step_rule.momentum: must lie in [0, 1), got {self.momentum}")
        self._retain: Gradients = {}
        self._adversary: Gradients = {}

    def check(self, objective: Objective) -> None:
        if missing := {"forget", "retain"} - {*objective.streams}:
            raise WagleError(
                f"step_rule: MUDMAN needs {' and '.join(sorted(missing))} rows, which objective "
                f"{type(objective).__name__} does not read"
            )

    def gradient(self, step: Step) -> Gradients:
        if not self._retain:
            self._retain = {name: torch.zeros_like(v) for name, v in step.values.items()}
        if not self._adversary or step.number % self.fork_every == 0:
            self._adversary = {name: v.clone() for name, v in step.values.items()}
        with step.at(self._adversary):
            forget, relearn = step.again(
                "forget_loss", lambda at: at.mean("forget", at["forget"].nll)
            )
        size, gradients = norm(forget), {}
        for name, u in forget.items():
            retain = self._retain[name] = self._retain[name].to(u.device)
            retain.lerp_(step.gradients["retain_loss"][name], 1 - self.momentum)
            self._adversary[name] = (
                self._adversary[name].to(u.device) - self.adversary_lr * relearn[name]
            )
            gradients[name] = retain + torch.where(retain.sign() == u.sign(), u / size, 0.0)
        return gradients

    def state_dict(self) -> dict[str, Any]:
        state = {"retain": self._retain, "adversary": self._adversary}
        return {key: {name: v.cpu() for name, v in of.items()} for key, of in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._retain = dict(state.get("retain", {}))
        self._adversary = dict(state.get("adversary", {}))


@dataclass
class RepSelect(StepRule):
    """Collapse the principal components of the forget gradient's matrices (arXiv 2606.17168).

    G ← C_U(C_V(G)), C_V(G) = G − G V (I − D⁻¹) Vᵀ and C_U the same from the left: V and U are the
    first right and left singular vectors of the forget gradient itself, or of the retain gradient
    (to remove what forgetting has in common with retaining); D = S / min S, with their singular
    values S (soft), or D⁻¹ = 0 (hard). Vectors such as norms are left as they are.

    As in the paper's code (repselect_simple.py at commit 5955f30) with ``use_lora=false``, if a
    step sees all forget rows; the code applies the first step's G in every epoch, here it is
    recomputed, under any objective and within any mask. The code has ``retain_weight 0``.

    Args:
        components: maximum number of singular vectors; fewer are closer to the plain gradient.
        of: ``forget`` or ``retain`` gradient; the latter needs a ``retain_weight`` above 0.
        collapse: ``soft`` or ``hard``.
    """

    components: int = 512
    of: Literal["forget", "retain"] = "forget"
    collapse: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        check_positive(self.components, "step_rule.components")

    def check(self, objective: Objective) -> None:
        super().check(objective)
        if self.of == "retain" and "retain" not in objective.streams:
            raise WagleError(
                f"step_rule: RepSelect of retain needs retain rows, which objective "
                f"{type(objective).__name__} does not read"
            )

    def gradient(self, step: Step) -> Gradients:
        basis, collapsed = step.gradients[f"{self.of}_loss"], {}
        for name, gradient in step.gradients["forget_loss"].items():
            matrix, other = step.dense(name, gradient), step.dense(name, basis[name])
            if matrix.dim() == 2:
                # what is not finite has no singular vectors; the checks of the run refuse it
                u, s, v = self._principal(other.nan_to_num(0.0, 0.0, 0.0))
                real = s > 1e-6 * s.max()  # others are only rounding errors
                least = s.where(real, torch.inf).min() if self.collapse == "soft" else 0.0
                share = torch.where(real, 1 - least / s, 0.0)
                matrix = matrix - (matrix @ v * share) @ v.mT
                matrix = matrix - u @ (share[:, None] * (u.mT @ matrix))
                gradient = step.selected(name, matrix)
            collapsed[name] = gradient
        return step.total(forget_loss=collapsed)

    def _principal(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, V of the first components."""
        if min(matrix.shape) > max(_EXACT, 2 * self.components):
            with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
                torch.manual_seed(0)  # of the random projection
                return torch.svd_lowrank(matrix, q=self.components)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, : self.components], s[: self.components], vt.mT[:, : self.components]
