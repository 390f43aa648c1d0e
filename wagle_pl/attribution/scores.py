"""Scores: how much each weight matters for forgetting, given the statistics of one pass.

To write a score, list the statistics that it ``needs`` and override ``__call__``; give its class
path as ``--model.score``::

    class Product(Score):
        needs = ("g_f", "g_r")

        def __call__(self, w):
            return w.g_f * w.g_r

The pass collects only what the scores of a run need: without ``g_r`` there is no retain pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, Optional, Union

import torch
from torch import Tensor

from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError, WrongType, check_positive
from wagle_pl.core.schema import check_arguments

__all__ = [
    "Curvature",
    "FisherRatio",
    "ForgetRetainRatio",
    "Gradient",
    "Magnitude",
    "Random",
    "Score",
    "Signed",
    "Snip",
    "Wagle",
    "Wanda",
    "WeightStatistics",
]

#: What a score may need.
COLLECTED = ("g_f", "g_r", "h", "h_diagonal", "fisher_f", "fisher_r", "activation")


@dataclass
class WeightStatistics:
    """Statistics of the weights of one parameter, in fp32 and, unless stated, in its shape.

    Fields that a score does not list in ``needs`` are None.
    """

    name: str
    theta: Tensor  # θ₀
    g_f: Optional[Tensor] = None  # of the forget loss; forgetting moves along +g_f
    g_r: Optional[Tensor] = None  # of the retain loss
    #: Diagonal Hessian of the retain loss, damped, above zero; 0-dim if one for all weights.
    h: Optional[Tensor] = None
    h_diagonal: Optional[Tensor] = None  # without damping, at least zero, one value per weight
    h_mean: Optional[float] = None  # mean of ``h_diagonal`` over all weights of the model
    fisher_f: Optional[Tensor] = None  # (1/N) Σ_n (∇ℓ_f,n)², over single forget rows
    fisher_r: Optional[Tensor] = None  # the same of retain rows
    #: ‖x_j‖₂ of each input j of a linear layer over the tokens of the forget rows, in a shape that
    #: broadcasts with the weight; None for other parameters.
    activation: Optional[Tensor] = None
    first: int = 0  # index of the first of these weights in the flattened parameter
    total: Optional[int] = None  # number of weights of the parameter; None: these are all


class Score:
    """One number per weight; the mask takes the weights with the largest absolute value."""

    #: Fields of :class:`WeightStatistics` that the score reads, besides ``theta``.
    needs: tuple[str, ...] = ("g_f",)
    signed: bool = False  # rank by the score itself; otherwise by its absolute value
    #: Whether the scores of a row (first dimension) depend only on that row, its position,
    #: ``activation`` and scalars. If so, ranks score different rows; otherwise whole parameters.
    by_row: bool = False

    def __call__(self, w: WeightStatistics) -> Tensor:
        """Scores of one parameter, in its shape: the same at each call. Override this.

        ``w`` may be modified in place.
        """
        raise WrongType(f"{type(self).__name__} must override __call__", option="score")

    def of_units(self, count: int) -> Optional[Tensor]:
        """(count,) scores of units of weights; None pools those of their weights."""
        return None

    @property
    def label(self) -> str:
        """Short name, for files: ``forget_retain_ratio`` of a ``ForgetRetainRatio``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()


def checked(score: Score, w: WeightStatistics) -> Tensor:
    """A score's values for one parameter, in fp32; raises :class:`WagleError` if they are not
    a floating-point tensor of its shape."""
    shape = tuple(w.theta.shape)
    values = score(w)
    got = f"a {type(values).__name__}"
    if isinstance(values, Tensor):
        if values.shape == shape and values.is_floating_point():
            return values.float()
        got = f"{values.dtype} of shape {tuple(values.shape)}"
    raise WagleError(
        f"score {type(score).__name__} gave {w.name} {got}, not floating-point numbers of its "
        f"shape {shape}"
    )


def try_out(
    score: Score,
    shapes: Mapping[str, Sequence[int]],
    scalar: bool,
    device: Union[torch.device, str] = "cpu",
) -> None:
    """Call a score on random statistics of the smallest parameter of each number of dimensions, so
    that a wrong score fails before the pass; ``scalar``: h is one number.

    Raises:
        WagleError: as :func:`checked`, or if the score gives other numbers when called again.
    """

    def statistics(name: str) -> WeightStatistics:
        generator = torch.Generator(device).manual_seed(0)

        def above_zero(shape: Sequence[int]) -> Tensor:
            numbers = torch.empty(tuple(shape), dtype=torch.float32, device=device)
            return numbers.uniform_(generator=generator) + 0.1

        shape = shapes[name]
        w = WeightStatistics(name, theta=above_zero(shape) - 0.6)
        w.h_mean = 0.6 if "h_diagonal" in score.needs else None
        for field in score.needs:
            if field in ("g_f", "g_r"):
                setattr(w, field, above_zero(shape) - 0.6)
            elif field == "activation":
                w.activation = above_zero(shape[-1:]) if len(shape) > 1 else None
            else:
                setattr(w, field, above_zero(() if field == "h" and scalar else shape))
        return w

    by_size = sorted(shapes, key=lambda name: prod(shapes[name]))
    for name in {len(shapes[name]): name for name in reversed(by_size)}.values():
        first, again = (checked(score, statistics(name)).nan_to_num() for _ in range(2))
        if not torch.equal(first, again):
            raise WagleError(
                f"score {type(score).__name__} gave {name} different values when called again",
                hint="it must return the same at each call",
            )


class Wagle(Score):
    """S = (θ − g_r / h) · g_f (WAGLE, arXiv 2410.17509, equation 8): to first order, the change of
    the forget loss when the weight is pruned and the others re-fit the retain loss."""

    by_row = True
    needs = ("g_f", "g_r", "h")

    def __call__(self, w: WeightStatistics) -> Tensor:
        return torch.addcdiv(w.theta, w.g_r, w.h, value=-1.0).mul_(w.g_f)


class Snip(Score):
    """S = θ · g_f (SNIP, arXiv 1810.02340): to first order, the change of the forget loss when the
    weight is pruned."""

    by_row = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        return w.theta * w.g_f


class Gradient(Score):
    """S = |g_f|: weight saliency (SalUn, arXiv 2310.12508)."""

    by_row = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        return w.g_f.abs()


class ForgetRetainRatio(Score):
    """S = |g_f| / (|g_r| + ε): salient for forgetting, not for retaining (a baseline of WAGLE).

    Args:
        eps: ε, against division by zero; a weight without any retain gradient ranks first.
    """

    by_row = True
    needs = ("g_f", "g_r")

    def __init__(self, eps: float = 1e-12) -> None:
        self.eps = check_positive(eps, "eps")

    def __call__(self, w: WeightStatistics) -> Tensor:
        return w.g_f.abs().div_(w.g_r.abs().add_(self.eps))


class FisherRatio(Score):
    """S = F_f / (F_r + ε), F the mean of squared gradients of single rows (selective synaptic
    dampening, arXiv 2308.07707, which dampens the weights with S > α). The pass runs row by row.

    Args:
        eps: ε, against division by zero.
    """

    by_row = True
    needs = ("fisher_f", "fisher_r")

    def __init__(self, eps: float = 1e-20) -> None:
        self.eps = check_positive(eps, "eps")

    def __call__(self, w: WeightStatistics) -> Tensor:
        return w.fisher_f / (w.fisher_r + self.eps)


class Curvature(Score):
    """S = |g_f| / (h + ε)^power: forget gradient per unit of retain curvature; h is a diagonal.

    At a minimum of ℓ_r, a step along axis i that adds δ to the retain loss has length √(2δ/h_i) and
    changes the forget loss by |g_f,i| times that: power ½. If all weights step equally far (sign
    descent and, nearly, Adam), the set of weights with the largest Σ|g_f| / √(Σh) holds those with
    the largest |g_f| / h: power 1.

    Args:
        damping_ratio: ε as a multiple of the mean of h over all weights.
        power: exponent of h + ε, above 0.
        numerator: ``forget`` is |g_f|. Two controls ask what it is worth: ``shuffled``, the |g_f| of
            a parameter in random order, and ``one``, which never sees a forget row: the lowest h.
    """

    by_row = True
    needs: tuple[str, ...] = ("g_f", "h_diagonal")

    def __init__(
        self,
        damping_ratio: float = 0.1,
        power: float = 0.5,
        numerator: Literal["forget", "shuffled", "one"] = "forget",
    ) -> None:
        self.damping_ratio = check_positive(damping_ratio, "damping_ratio")
        self.power = check_positive(power, "power")
        check_arguments(Curvature.__init__, {"numerator": numerator}, "")
        self.numerator = numerator
        if numerator == "one":
            self.needs = ("h_diagonal",)
        elif numerator == "shuffled":
            self.by_row = False  # the order is that of a whole parameter

    def __call__(self, w: WeightStatistics) -> Tensor:
        weight = (w.h_diagonal + self.damping_ratio * w.h_mean).pow_(-self.power)
        if self.numerator == "one":
            return weight
        gradients = w.g_f.abs()
        if self.numerator == "shuffled":
            generator = torch.Generator().manual_seed(stable_seed("shuffled", w.name))
            order = torch.randperm(gradients.numel(), generator=generator)
            gradients = gradients.view(-1)[order.to(gradients.device)].view_as(gradients)
        return weight.mul_(gradients)


class Signed(Score):
    """S = −g_r · g_f / h, WAGLE's second term, ranked with its sign: weights for which forgetting
    does not oppose retaining."""

    by_row = True
    needs = ("g_f", "g_r", "h")
    signed = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        return (w.g_r * w.g_f).div_(w.h).neg_()


class Magnitude(Score):
    """S = |θ| (magnitude pruning, arXiv 1506.02626). No pass over data is needed."""

    by_row = True
    needs = ()

    def __call__(self, w: WeightStatistics) -> Tensor:
        return w.theta.abs()


class Wanda(Score):
    """S_ij = |θ_ij| · ‖x_j‖₂, x the input of the linear layer on all tokens of the forget rows
    (Wanda, arXiv 2306.11695, which ranks within each output row: ``scope: row``).

    Weights outside linear layers (norms, biases, embeddings) score 0; an embedding tied to the
    output layer has that layer's score.
    """

    by_row = True
    needs = ("activation",)

    def __call__(self, w: WeightStatistics) -> Tensor:
        return torch.zeros_like(w.theta) if w.activation is None else w.theta.abs() * w.activation


class Random(Score):
    """Uniform random numbers in [0, 1): the control for every other score.

    Each ``chunk`` of a parameter's weights has a generator of its own, so that a rank draws little
    more than its rows; torch's generators cannot skip numbers.

    Args:
        seed: of the numbers, which also depend on the parameter's name.
    """

    by_row = True
    needs = ()
    chunk: ClassVar[int] = 1 << 19

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, w: WeightStatistics) -> Tensor:
        stop = w.first + w.theta.numel()
        chunked = (stop if w.total is None else w.total) > self.chunk
        parts = [torch.empty(0)]
        for begin in range(w.first // self.chunk * self.chunk, stop, self.chunk):
            seed = stable_seed(self.seed, w.name, *([begin // self.chunk] if chunked else []))
            generator = torch.Generator().manual_seed(seed)
            numbers = torch.rand(min(self.chunk, stop - begin), generator=generator)
            parts.append(numbers[max(0, w.first - begin) :])
        return torch.cat(parts).view(w.theta.shape).to(w.theta.device)

    def of_units(self, count: int) -> Tensor:
        """One number for each unit: means of many weights would be alike, and never the largest."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "units"))
        return torch.rand(count, generator=generator)
