"""Diagonal estimates of the retain loss's Hessian.

An estimator adds to a running sum: one fp32 tensor per parameter, or only its mean. The sum
estimates the diagonal for the *sum* of the rows' losses; :class:`~wagle_pl.attribution.Collected`
divides by their number. To write your own estimator, subclass :class:`Hessian`; give its class path
as ``--model.hessian``, or an object in Python.

The Hessian of a loss −log p(y|x) is H = G + R, where G = E_ŷ~p[∇log p(ŷ) ∇log p(ŷ)ᵀ], positive
semi-definite, is the Gauss–Newton matrix (for this loss also the Fisher information), and R
vanishes where the model fits its labels. The *empirical* Fisher uses the labels of the data for ŷ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from wagle_pl.attribution.sums import GradientSums, Sums, pieces
from wagle_pl.core import distributed
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError, WrongType, check_positive
from wagle_pl.core.registry import find_class, resolve
from wagle_pl.lm.inference import Predictions, in_chunks, logprobs_of

#: Name under which :class:`GradientSums` keeps the sum of the diagonal, and the sum of its mean.
DIAGONAL, TRACE = "h", "h_trace"


@dataclass
class MicroBatch:
    """Rows of one stream, and forward passes over them."""

    #: A new forward pass: predictions of the labels, row after row, and the sum of the rows'
    #: losses, a scalar.
    run: Callable[[], tuple[Predictions, Tensor]]
    labels: Tensor  # (B, T), -100 where nothing is predicted
    lengths: Sequence[int]  # number of labels of each row
    seeds: Sequence[int]  # one per row: what is drawn for it does not depend on its batch
    step_seed: int = 0  # for what is drawn once per step, for all micro-batches and ranks
    done: Optional[tuple[Predictions, Tensor]] = None  # a forward pass that has already been run
    #: Whether one graph may serve several backward passes; not if weights are sharded, since they
    #: are gathered for one.
    reusable: bool = True

    def forward(self) -> tuple[Predictions, Tensor]:
        """Predictions and loss, with their graph."""
        if self.done is None:
            self.done = self.run()
        return self.done

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward pass from a function of :meth:`forward`'s output; ``last`` frees the graph."""
        if loss.requires_grad:  # False if the loss uses no parameter of this pass
            loss.backward(retain_graph=self.reusable and not last)
        if last or not self.reusable:
            self.done = None


class Hessian:
    """Estimates a Hessian diagonal, micro-batch by micro-batch; abstract.

    Args:
        samples: random draws per step; the error decreases with the square root of their number.
        diagonal: keep the diagonal; otherwise only its mean.
    """

    per_example = False  # whether each row must be its own micro-batch
    shardable = True  # weights may be sharded (ZeRO-3), or differentiated group by group

    # the cost of one draw, for ``wagle plan``
    step_sums = 0  # fp32 sums of the model's size kept during a step, besides the diagonal
    temporaries = 0  # tensors of the model's size and dtype kept during a backward pass

    samples, diagonal = 1, True  # of a subclass that does not call ``__init__``

    def __init__(self, samples: int = 1, diagonal: bool = True) -> None:
        self.samples = samples
        self.diagonal = diagonal

    def forward_context(self) -> AbstractContextManager:
        """Context in which forward passes must run."""
        return nullcontext()

    def add(self, rows: MicroBatch, sums: GradientSums) -> None:
        """Add ``samples`` draws for one micro-batch. Override this."""
        raise WrongType(f"{type(self).__name__} must override add", option="hessian")

    def end_step(self, sums: GradientSums) -> None:
        """Called after the micro-batches of a step, on all ranks, have been added."""


class GaussNewton(Hessian):
    """Gauss–Newton–Bartlett: squared gradients of labels drawn from the model (Liu et al. 2023,
    arXiv 2305.14342, algorithm 2). Unbiased for the diagonal of the Gauss–Newton matrix, never
    negative.

    The gradient of a whole step is squared once, so its split into micro-batches and ranks matters
    only by the order of sums.
    """

    step_sums = 1

    def add(self, rows: MicroBatch, sums: GradientSums) -> None:
        for draw in range(self.samples):
            predicted, _ = rows.forward()
            seeds = [stable_seed(seed, draw) for seed in rows.seeds]
            drawn = sample_labels(predicted, rows.lengths, seeds)
            loss = bartlett_loss(predicted, drawn, rows.labels)
            with sums.into(in_step=f"drawn {draw}"):
                rows.backward(loss, last=draw + 1 == self.samples)

    def end_step(self, sums: GradientSums) -> None:
        into = {"squares": DIAGONAL} if self.diagonal else {"squared_norm": TRACE}
        for draw in range(self.samples):
            sums.fold(f"drawn {draw}", **into)


class Fisher(Hessian):
    """Empirical Fisher: Σ_n (∇ℓ_n)², ℓ_n the loss of one row. Exact, never negative, but not an
    unbiased estimate of the Hessian (Kunstner et al. 2019, arXiv 1905.12558).
    """

    per_example = True

    def __init__(self, samples: int = 1, diagonal: bool = True) -> None:
        super().__init__(1, diagonal)  # nothing is drawn

    def add(self, rows: MicroBatch, sums: GradientSums) -> None:
        _, loss = rows.forward()
        with sums.into(squares=DIAGONAL):
            rows.backward(loss)


class Hutchinson(Hessian):
    """z ⊙ Hz with Rademacher z (Bekas et al. 2007), Hz by double backward. Unbiased for the
    diagonal of the true Hessian; single estimates may be negative.

    z is the same for all micro-batches of a step, so how its batch is split matters only by the
    order of sums.
    """

    shardable = False
    temporaries = 3

    def forward_context(self) -> AbstractContextManager:
        """Fused attention has no second derivative."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)

    def add(self, rows: MicroBatch, sums: GradientSums) -> None:
        buffers = sums.buffers(DIAGONAL)
        _, loss = rows.forward()
        gradients = torch.autograd.grad(loss, sums.parameters, create_graph=True, allow_unused=True)
        used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        for draw in range(self.samples):
            probes = rademacher(sums.parameters, stable_seed(rows.step_seed, draw))
            products = torch.autograd.grad(
                [gradients[i] for i in used],
                [sums.parameters[i] for i in used],
                [probes[i] for i in used],
                retain_graph=draw + 1 < self.samples,
                allow_unused=True,
            )
            product_of = dict(zip(used, products, strict=True))
            for i, z in enumerate(probes):  # of all, used or not: a collective
                product = product_of.get(i)
                estimate = torch.zeros_like(z) if product is None else z.float() * product.float()
                sums.add(buffers, i, estimate.float())


def estimator_of(hessian: str) -> Optional[type[Hessian]]:
    """The estimator that ``model.hessian`` names; None for ``scalar``."""
    if hessian == "scalar":
        return None
    if hessian == "auto":
        return GaussNewton
    return find_class(Hessian, hessian, "hessian", also=("auto", "scalar"))


def check_run(
    precision: str, stage: int, devices: int, estimator: Optional[Hessian], sums: Sums
) -> None:
    """Refuse a precision, a ZeRO stage or several passes with which attribution cannot work."""
    if precision not in ("32-true", "bf16-mixed", "bf16-true"):
        raise WagleError("attribution runs in 32-true, bf16-mixed or bf16-true, not in fp16")
    unsharded = estimator is not None and not estimator.shardable
    if stage == 3 and unsharded:
        raise WagleError(
            "this Hessian estimate needs whole parameters, which ZeRO-3 shards: choose another "
            "stage"
        )
    if sums.passes > 1 and (unsharded or devices > 1 or stage):
        reason = "this Hessian estimate needs all parameters at once"
        reason = reason if unsharded else "several devices and ZeRO share sums out already"
        message = f"passes={sums.passes} cannot be used: {reason}"
        raise WagleError(message, "sums", "use host or device")


def choose_hessian(
    hessian: Union[str, Hessian, Mapping[str, Any]],
    gamma: Union[float, str],
    samples: int,
    needs: set[str],
) -> tuple[str, Optional[Hessian]]:
    """The name of the option ``hessian``, for records, and its estimator: None if the scores need
    none, or γ is a number, which implies ``scalar``.

    Args:
        samples: of an estimator that is given by its name.

    Raises:
        WagleError: if the options contradict each other, there is no such estimator, it does not
            override :meth:`Hessian.add`, or it is not what the scores need.
    """
    option = hessian if isinstance(hessian, str) else resolve(Hessian, hessian, "hessian")
    name = option if isinstance(option, str) else type(option).__name__
    if not isinstance(gamma, str):
        check_positive(gamma, "gamma")
        if option not in ("scalar", "auto"):
            message = f"a number is for hessian scalar, not for {name}; got {gamma}"
            raise WagleError(message, "gamma", "leave one of them out")
        name = option = "scalar"
    elif option == "scalar":
        raise WagleError("scalar needs a number", option="hessian", hint="give --model.gamma")
    if isinstance(option, str):
        kind = estimator_of(option)
        diagonal = option != "auto" or "h_diagonal" in needs
        estimator = None if kind is None else kind(samples=samples, diagonal=diagonal)
    else:
        estimator = option
        if samples != 1:
            message = "must be 1 for a Hessian object, which has samples of its own"
            raise WagleError(message, option="hessian_samples")
    if "h_diagonal" in needs and (estimator is None or not estimator.diagonal):
        needed = "a score here needs a Hessian diagonal, not a scalar"
        raise WagleError(needed, hint="give --model.hessian gauss_newton")
    if estimator is not None and type(estimator).add is Hessian.add:
        raise WrongType(f"{type(estimator).__name__} must override add", option="hessian")
    return name, estimator if needs & {"h", "h_diagonal"} else None


@torch.no_grad()
def sample_labels(predicted: Predictions, lengths: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Tokens, (N,), drawn from the model's predictions, row after row, in place of the labels.

    Args:
        lengths, seeds: number of labels, and seed, of each row.
    """
    device = predicted.states.device
    drawn = [torch.zeros(0, dtype=torch.long, device=device)]
    places = torch.arange(len(predicted), device=device)
    for seed, row in zip(seeds, places.split(lengths), strict=True):
        generator = torch.Generator(device=device).manual_seed(seed)
        for part in row.split(predicted.at_once) if len(row) else ():
            # a loss that is not finite is refused, but a GPU must not meet it here
            probabilities = predicted.at(part).logits().softmax(-1).nan_to_num(1.0)
            drawn.append(torch.multinomial(probabilities, 1, generator=generator).view(-1))
    return torch.cat(drawn)


def bartlett_loss(predicted: Predictions, drawn: Tensor, labels: Tensor) -> Tensor:
    """Σ_n T_n^(−1/2) Σ_t −log p(drawn_nt), whose squared gradient estimates the Gauss–Newton
    diagonal without bias; ``drawn`` are from :func:`sample_labels`.

    With one label drawn for each predicted token, E[∇ log p ∇ log pᵀ] is that token's Gauss–Newton
    matrix (Bartlett's identity), and cross terms vanish as draws are independent. So the loss
    Σ_n (1/T_n) Σ_t ℓ_nt has the diagonal
    Σ_n Σ_t (1/T_n) E[(∇ ℓ̂_nt)²] = E[(∇ Σ_n Σ_t T_n^(−1/2) ℓ̂_nt)²].
    """
    lengths = (labels[:, 1:] != -100).sum(-1)
    scale = lengths.rsqrt().repeat_interleave(lengths, output_size=len(drawn))
    return -(in_chunks(logprobs_of, predicted, drawn) * scale).sum()


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent signs, ±1 with equal chance, in the shape and dtype of each tensor."""
    generator = torch.Generator(device=like[0].device).manual_seed(seed)
    signs = (torch.empty_like(tensor, requires_grad=False) for tensor in like)
    return [tensor.bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for tensor in signs]


@dataclass
class DampedHessian:
    """h at the end of the pass: one γ for all weights, or the damped diagonal
    h_i = max(ĥ_i, 0) + damping × mean(max(ĥ, 0)), above zero whatever the estimate.

    Raises:
        WagleError: if the mean is not above zero.
    """

    mean: float  # of max(ĥ, 0) over all weights, or γ
    #: This rank's rows of the sums of ĥ, in parameter order; None for a scalar.
    diagonal: Optional[Sequence[Tensor]] = None
    scale: float = 1.0  # factor from the sums to ĥ
    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.mean > 0:
            raise WagleError(
                "the retain loss has no curvature here (mean of its Hessian diagonal: "
                f"{self.mean:g})",
                hint="give --model.hessian scalar and --model.gamma a number",
            )

    @classmethod
    def of_diagonal(cls, diagonal: Sequence[Tensor], scale: float, damping: float) -> DampedHessian:
        """From the sums of an estimator. Collective."""
        total = sum(
            float(sum(piece.clamp(min=0).sum(dtype=torch.float64) for piece in pieces(tensor)))
            for tensor in diagonal
        )
        weights = sum(tensor.numel() for tensor in diagonal)
        both = torch.tensor([total, weights], dtype=torch.float64)
        total, weights = distributed.all_reduce_sum(both).tolist()
        return cls(total * scale / weights, diagonal, scale, damping)

    def plain(self, position: int, rows: Any = ...) -> Tensor:
        """max(ĥ, 0) of one parameter or of some of its rows, without damping."""
        return (self.diagonal[position][rows] * self.scale).clamp_(min=0)

    def damped(self, position: int, rows: Any = ...) -> Tensor:
        """h of one parameter or of some of its rows."""
        return self.plain(position, rows).add_(self.damping * self.mean)
