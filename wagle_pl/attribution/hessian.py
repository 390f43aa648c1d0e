"""Diagonal estimates of the retain loss's Hessian.

An estimator adds what one forward pass tells it to a running sum (one fp32 tensor a parameter, or only its mean). What
it sums over rows is the diagonal for the *sum* of the rows' losses; the module divides by their number. To add an
estimator, subclass :class:`Hessian` and name it, or its class path, as ``--model.hessian``.

The Hessian of a loss −log p(y|x) is H = G + R, where G = E_ŷ~p[∇log p(ŷ) ∇log p(ŷ)ᵀ], positive semi-definite, is the
Gauss–Newton matrix (for this loss also the Fisher information), and R vanishes where the model fits its labels. The
*empirical* Fisher takes the labels of the data in place of ŷ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import find_class
from wagle_pl.core.seeds import stable_seed

#: Name under which :class:`GradientSums` keeps the sum of the diagonal, and the sum of its mean.
DIAGONAL, TRACE = "h", "h_trace"


class Piece:
    """Some rows of a batch, and forward passes over them.

    Args:
        run: a new forward pass: (B, T, V) logits, position t of which predicts token t + 1, and the sum of the rows'
            losses, a scalar.
        labels: (B, T), -100 where nothing is predicted, and in rows that only pad the batch.
        seeds: one a row, so that what is drawn for a row does not depend on the batch it is in.
        step_seed: for what is drawn once a step, the same for all its micro-batches and ranks.
        done: a forward pass that stands already.
        keeps: whether a graph may stand for several backward passes; not where weights are spread over ranks, and
            fetched for one.
    """

    def __init__(
        self,
        run: Callable[[], tuple[Tensor, Tensor]],
        labels: Tensor,
        seeds: Sequence[int],
        step_seed: int = 0,
        done: Optional[tuple[Tensor, Tensor]] = None,
        keeps: bool = True,
    ) -> None:
        self.run = run
        self.labels = labels
        self.seeds = seeds
        self.step_seed = step_seed
        self.keeps = keeps
        self._done = done

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logits and loss, their graph alive."""
        if self._done is None:
            self._done = self.run()
        return self._done

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """A backward pass from something computed from :meth:`forward`; ``last`` frees the graph as it goes."""
        loss.backward(retain_graph=self.keeps and not last)
        if last or not self.keeps:
            self._done = None


class Hessian:
    """Estimates a diagonal, piece by piece.

    Args:
        samples: random draws for each step; the error falls with their square root.
        diagonal: keep the diagonal; otherwise only its mean.
    """

    #: Whether each row must be a piece of its own.
    per_example = False

    #: Whether weights may be spread over ranks (ZeRO-3).
    spreads = True

    # What one draw costs, for ``wagle plan``:

    #: backward passes, beside the one for g_r;
    backward_passes = 0

    #: whether they go through its graph, whose activations then stay for them;
    same_graph = False

    #: fp32 sums of the model's size that stand while a step lasts, beside the diagonal;
    step_sums = 0

    #: tensors of the model's size and dtype that stand in a backward pass.
    temporaries = 0

    def __init__(self, samples: int = 1, diagonal: bool = True) -> None:
        self.samples = samples
        self.diagonal = diagonal

    def forward_context(self) -> AbstractContextManager:
        """What the forward pass of a piece must run under."""
        return nullcontext()

    def add(self, piece: Piece, sums: GradientSums) -> None:
        """Add ``samples`` draws for one piece. Override this."""
        raise TypeError(f"{type(self).__name__} must override add")

    def end_step(self, sums: GradientSums) -> None:
        """Called once all pieces of a step are added, those of every rank and micro-batch."""


class GaussNewton(Hessian):
    """Gauss–Newton–Bartlett: squared gradients of labels drawn from the model (Liu et al. 2023, arXiv 2305.14342,
    algorithm 2). Unbiased for the diagonal of the Gauss–Newton matrix, never negative.

    The gradient is that of the whole step, squared once: how a global batch is cut into micro-batches and ranks does
    not matter. Each draw needs, while a step lasts, one more tensor of the model's size."""

    backward_passes = 1
    same_graph = True
    step_sums = 1

    def add(self, piece: Piece, sums: GradientSums) -> None:
        """One backward pass a draw."""
        for draw in range(self.samples):
            logits, _ = piece.forward()
            drawn = sample_labels(
                logits, piece.labels, [stable_seed(seed, draw) for seed in piece.seeds]
            )
            with sums.into(in_step=f"drawn {draw}"):
                piece.backward(bartlett_loss(logits, drawn), last=draw + 1 == self.samples)

    def end_step(self, sums: GradientSums) -> None:
        """Square."""
        for draw in range(self.samples):
            sums.fold(
                f"drawn {draw}",
                **({"squares": DIAGONAL} if self.diagonal else {"squared_norm": TRACE}),
            )


class Fisher(Hessian):
    """Empirical Fisher: Σ_n (∇ℓ_n)², ℓ_n the loss of one row (its mean per token). Exact, never negative, and no
    unbiased estimate of the Hessian (Kunstner et al. 2019, arXiv 1905.12558). Rows pass one at a time.

    Args:
        samples: of no meaning, as nothing is drawn.
        diagonal: see :class:`Hessian`.
    """

    per_example = True

    def __init__(self, samples: int = 1, diagonal: bool = True) -> None:
        super().__init__(1, diagonal)

    def add(self, piece: Piece, sums: GradientSums) -> None:
        """Square the row's own gradient."""
        _, loss = piece.forward()
        with sums.into(squares=DIAGONAL):
            piece.backward(loss)


class Hutchinson(Hessian):
    """z ⊙ Hz with Rademacher z (Bekas et al. 2007), Hz by a backward pass through the backward pass. Unbiased for the
    diagonal of the true Hessian; single estimates may be negative. z is the same for all that a step sees, so how its
    batch is cut does not matter. Needs, while it runs, three more tensors of the model's size (z, the gradient and Hz)
    and the graph of the backward pass."""

    spreads = False
    backward_passes = 3
    temporaries = 3

    def forward_context(self) -> AbstractContextManager:
        """Fused attention has no second derivative."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)

    def add(self, piece: Piece, sums: GradientSums) -> None:
        """One double backward pass a draw."""
        parameters, buffers = sums.parameters, sums.buffers(DIAGONAL)
        _, loss = piece.forward()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = [
            i
            for i, gradient in enumerate(gradients)
            if gradient is not None and gradient.requires_grad
        ]
        for draw in range(self.samples):
            probes = rademacher([parameters[i] for i in used], stable_seed(piece.step_seed, draw))
            products = torch.autograd.grad(
                [gradients[i] for i in used],
                [parameters[i] for i in used],
                probes,
                retain_graph=draw + 1 < self.samples,
                allow_unused=True,
            )
            for i, z, product in zip(used, probes, products, strict=True):
                if product is not None:
                    sums.add(buffers, i, z.float().mul_(product.float()))


def estimator_of(hessian: str) -> Optional[type[Hessian]]:
    """The estimator that ``model.hessian`` names; None for ``scalar``.

    Raises:
        WagleError: listing the valid names.
    """
    if hessian == "scalar":
        return None
    if hessian == "auto":  # only its mean is kept where no score needs more
        return GaussNewton
    return find_class(Hessian, hessian, "hessian", also=("auto", "scalar"))


def sample_labels(logits: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Labels drawn from the model's own predictions, where there is a label.

    Args:
        logits: (B, T, V); position t predicts token t + 1.
        labels: (B, T), -100 where nothing is predicted.
        seeds: one a row: a row's draw does not depend on the batch it is in.

    Returns:
        (B, T) labels, drawn where ``labels`` has one and -100 elsewhere.
    """
    drawn = torch.full_like(labels, -100)
    for i, seed in enumerate(seeds):
        mask = labels[i, 1:] != -100
        if not mask.any():
            continue
        probabilities = logits[i, :-1][mask].detach().float().softmax(-1)
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn[i, 1:][mask] = torch.multinomial(probabilities, 1, generator=generator).view(-1)
    return drawn


def bartlett_loss(logits: Tensor, drawn: Tensor) -> Tensor:
    """Scalar whose squared gradient estimates the Gauss–Newton diagonal without bias.

    With one label drawn for each predicted token, E[∇ log p ∇ log pᵀ] is that token's Gauss–Newton matrix (Bartlett's
    identity) and draws are independent, so cross terms vanish. The loss Σ_n (1/T_n) Σ_t ℓ_nt has the Gauss–Newton
    diagonal Σ_n Σ_t (1/T_n) E[(∇ ℓ̂_nt)²] = E[(∇ Σ_n Σ_t T_n^(−1/2) ℓ̂_nt)²].

    Args:
        logits: (B, T, V).
        drawn: (B, T) labels from :func:`sample_labels`.

    Returns:
        Σ_n T_n^(−1/2) Σ_t −log p(drawn_nt).
    """
    targets = drawn[:, 1:]
    mask = targets != -100
    losses = F.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    scale = mask.sum(-1, keepdim=True).clamp(min=1).rsqrt().expand_as(mask)[mask]
    return (losses * scale).sum()


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent signs, ±1 with equal chance, in the shape, dtype and place of each tensor."""
    generators: dict[Any, torch.Generator] = {}
    signs = []
    for tensor in like:
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(device=tensor.device).manual_seed(seed)
        sign = torch.empty_like(tensor, requires_grad=False).detach()
        sign.bernoulli_(0.5, generator=generators[tensor.device])
        signs.append(sign.mul_(2).sub_(1))
    return signs


class DampedHessian:
    """h at the end of the pass: one γ for all weights, or a diagonal with damping.

    The rule: h_i = max(ĥ_i, 0) + damping × mean(max(ĥ, 0)), so that h is at least damping × its mean, whatever an
    estimate says, and no score is NaN or infinite because of it. A scalar needs no damping.

    Args:
        mean: mean of max(ĥ, 0) over all weights, or γ.
        diagonal: this rank's rows of the sums of ĥ, in parameter order; None where h is a scalar.
        scale: factor from the sums to ĥ.
        damping: above 0.

    Raises:
        WagleError: if the mean is not above zero.
    """

    def __init__(
        self,
        mean: float,
        diagonal: Sequence[Tensor] | None = None,
        scale: float = 1.0,
        damping: float = 0.1,
    ) -> None:
        if not mean > 0:
            raise WagleError(
                f"the retain loss has no curvature here (mean of its Hessian diagonal: {mean:g}); "
                "give --model.hessian scalar and --model.gamma a number"
            )
        self.mean = mean
        self.damping = damping
        self._diagonal = diagonal
        self._scale = scale

    @classmethod
    def of_diagonal(cls, diagonal: Sequence[Tensor], scale: float, damping: float) -> DampedHessian:
        """From the sums of an estimator; their mean is taken here."""
        total = sum(float(tensor.clamp(min=0).sum(dtype=torch.float64)) for tensor in diagonal)
        weights = sum(tensor.numel() for tensor in diagonal)
        total, weights = distributed.all_reduce_sum(
            torch.tensor([total, weights], dtype=torch.float64)
        ).tolist()
        return cls(total * scale / weights, diagonal, scale, damping)

    def plain(self, position: int) -> Tensor:
        """max(ĥ, 0) of one parameter, without damping."""
        return (self._diagonal[position] * self._scale).clamp_(min=0)

    def damped(self, position: int) -> Tensor:
        """h of one parameter."""
        return self.plain(position).add_(self.damping * self.mean)

    def scalar(self, device: torch.device) -> Tensor:
        """The mean as h of every weight: a 0-dim tensor."""
        return torch.tensor(self.mean, device=device)
