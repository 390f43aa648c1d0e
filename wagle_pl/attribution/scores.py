"""Scores: how much each weight matters for forgetting, given what one gradient pass saw of it.

To write one's own, subclass :class:`Score`, say what it ``needs`` and override ``__call__``; give its class path as
``--model.score``::

    class Product(Score):
        needs = ("g_f", "g_r")

        def __call__(self, w):
            return w.g_f * w.g_r

The pass collects what the scores of a run need and nothing else: one that needs no ``g_r`` costs no retain pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Optional, Union

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.seeds import stable_seed
from wagle_pl.masks import Restriction
from wagle_pl.masks.names import parse_layers

_LARGE = 1 << 20  # weights of a parameter on which a score is not tried if there is a smaller one

#: What a score may need.
COLLECTED = ("g_f", "g_r", "h", "h_diagonal", "fisher_f", "fisher_r", "activation")


@dataclass
class WeightStatistics:
    """What is known of the weights of one parameter; tensors have its shape, in fp32. Unless a score ``needs`` a field
    it is None.

    Attributes:
        name: of the parameter.
        theta: θ₀.
        g_f: gradient of the forget loss, oriented so that forgetting moves along +g_f.
        g_r: gradient of the retain loss.
        h: diagonal Hessian of the retain loss: one number (0-dim) or one a weight, damped, above zero.
        h_diagonal: the same one a weight, whatever h is, without damping, at least zero.
        h_mean: mean of ``h_diagonal`` over all weights of the model; there if ``h_diagonal`` is.
        fisher_f: (1/N) Σ_n (∇ℓ_f,n)², squared gradients of single forget rows.
        fisher_r: the same of retain rows.
        activation: ‖x_j‖₂ of each input j of a linear layer over the tokens of the forget rows, in the shape in which
            it multiplies the weight: (in,), or (in, 1) where the weight lies transposed, (experts, 1, in) or
            (experts, in, 1) of experts in one tensor; None for other parameters.
    """

    name: str
    theta: Tensor
    g_f: Optional[Tensor] = None
    g_r: Optional[Tensor] = None
    h: Optional[Tensor] = None
    h_diagonal: Optional[Tensor] = None
    h_mean: Optional[float] = None
    fisher_f: Optional[Tensor] = None
    fisher_r: Optional[Tensor] = None
    activation: Optional[Tensor] = None


class Score:
    """One number a weight; the mask takes the weights with the largest absolute value."""

    #: Fields of :class:`WeightStatistics` that the score reads, beside ``theta``.
    needs: tuple[str, ...] = ("g_f",)

    #: Ranked by the score itself; otherwise by its absolute value.
    signed: bool = False

    #: Whether a row's scores (first dimension) depend on that row alone, besides ``activation`` and numbers. With
    #: several ranks each then scores its rows; otherwise every rank scores the whole parameter.
    by_row: bool = False

    def __call__(self, w: WeightStatistics) -> Tensor:
        """Scores of one parameter, in its shape. Override this.

        Called several times for each parameter, which must give the same each time; ``w`` may be written to.
        """
        raise TypeError(f"{type(self).__name__} must override __call__")

    def share(self, shapes: Mapping[str, Sequence[int]]) -> Optional[Fraction]:
        """Share of the weights of these parameters that the score itself says to take; None: the density says."""
        return None

    @property
    def label(self) -> str:
        """Short name, for files: ``forget_retain_ratio`` of a ``ForgetRetainRatio``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()


def checked(score: Score, w: WeightStatistics) -> Tensor:
    """A score's numbers for one parameter, in fp32.

    Raises:
        WagleError: if they are no floating-point tensor of the parameter's shape.
    """
    shape, gave = tuple(w.theta.shape), f"score {type(score).__name__} gave {w.name}"
    values = score(w)
    if not isinstance(values, Tensor):
        raise WagleError(
            f"{gave} a {type(values).__name__}, not a tensor of the parameter's shape {shape}"
        )
    if values.shape != shape:
        raise WagleError(f"{gave} shape {tuple(values.shape)}, the parameter's is {shape}")
    if not values.is_floating_point():
        raise WagleError(f"{gave} {values.dtype}, not floating-point numbers")
    return values.float()


def try_out(
    score: Score,
    shapes: Mapping[str, Sequence[int]],
    scalar: bool,
    inputs: Mapping[str, Sequence[int]],
    device: Union[torch.device, str] = "cpu",
) -> None:
    """Call a score on random numbers in the shapes of a matrix, a vector, ... of the model: before a pass is spent.

    Args:
        score: the score.
        shapes: parameter name -> shape; of each number of dimensions the first that is not large is taken.
        scalar: whether h is one number.
        inputs: name of a linear map's weight -> shape of its ``activation``.
        device: where the numbers are.

    Raises:
        WagleError: as :func:`checked`, or if the score gives other numbers when called again.
    """
    for dimensions in sorted({len(shape) for shape in shapes.values()}, reverse=True):
        sizes = {name: prod(shape) for name, shape in shapes.items() if len(shape) == dimensions}
        name = min(sizes, key=lambda name: sizes[name] if sizes[name] > _LARGE else 0)
        made = [
            _random_statistics(score, name, shapes[name], scalar, inputs.get(name), device)
            for _ in range(2)
        ]
        first, again = (checked(score, w).nan_to_num() for w in made)
        if not torch.equal(first, again):
            raise WagleError(
                f"score {type(score).__name__} gave {name} other numbers when called again: a Score is "
                "called several times for each parameter and must give the same each time"
            )


def _random_statistics(
    score: Score,
    name: str,
    shape: Sequence[int],
    scalar: bool,
    inputs: Optional[Sequence[int]],
    device: Union[torch.device, str],
) -> WeightStatistics:
    """What a score needs of a parameter, as the pass will give it, of numbers that are the same each time."""
    generator = torch.Generator(device).manual_seed(0)

    def positive(shape: Sequence[int]) -> Tensor:
        return (
            torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float32) + 0.1
        )

    w = WeightStatistics(name, theta=positive(shape) - 0.6)
    for field in score.needs:
        if field in ("g_f", "g_r"):
            setattr(w, field, positive(shape) - 0.6)
        elif field == "activation":
            w.activation = None if inputs is None else positive(inputs)
        else:
            setattr(w, field, positive(() if field == "h" and scalar else shape))
    w.h_mean = 0.6 if "h_diagonal" in score.needs else None
    return w


class Wagle(Score):
    """S = (θ − g_r / h) · g_f (WAGLE, arXiv 2410.17509, equation 8).

    To first order, the change of the forget loss when the weight is pruned and the others re-fit the retain loss.
    """

    by_row = True
    needs = ("g_f", "g_r", "h")

    def __call__(self, w: WeightStatistics) -> Tensor:
        """(θ − g_r / h) · g_f."""
        return torch.addcdiv(w.theta, w.g_r, w.h, value=-1.0).mul_(w.g_f)


class Snip(Score):
    """S = θ · g_f (SNIP, arXiv 1810.02340): to first order, the change of the forget loss when the weight is pruned.

    WAGLE without the retain term.
    """

    by_row = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        """θ · g_f."""
        return w.theta * w.g_f


class Gradient(Score):
    """S = |g_f|: weight saliency (SalUn, arXiv 2310.12508)."""

    by_row = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        """|g_f|."""
        return w.g_f.abs()


class ForgetRetainRatio(Score):
    """S = |g_f| / (|g_r| + ε): salient for forgetting and not for retaining (used as a baseline of WAGLE).

    Args:
        eps: ε, against division by zero; a weight without any retain gradient ranks first.
    """

    by_row = True
    needs = ("g_f", "g_r")

    def __init__(self, eps: float = 1e-12) -> None:
        self.eps = check_positive(eps, "eps")

    def __call__(self, w: WeightStatistics) -> Tensor:
        """|g_f| / (|g_r| + ε)."""
        return w.g_f.abs().div_(w.g_r.abs().add_(self.eps))


class FisherRatio(Score):
    """S = F_f / (F_r + ε), F the mean of squared gradients of single rows (selective synaptic dampening, arXiv
    2308.07707, which dampens the weights with S > α). The pass runs row by row.

    Args:
        eps: ε, against division by zero; a weight without any retain gradient ranks first.
    """

    by_row = True
    needs = ("fisher_f", "fisher_r")

    def __init__(self, eps: float = 1e-20) -> None:
        self.eps = check_positive(eps, "eps")

    def __call__(self, w: WeightStatistics) -> Tensor:
        """F_f / (F_r + ε)."""
        return w.fisher_f / (w.fisher_r + self.eps)


class Curvature(Score):
    """S = |g_f| / (h + ε)^power: forget gradient per unit of retain curvature.

    A step along the i-th axis that costs δ of retain loss at a minimum of ℓ_r has length √(2δ/h_i), and gains |g_f,i|
    times that of forget loss: power ½. With an optimiser that steps as far in every weight (sign descent, and nearly
    Adam), a set of weights gains Σ|g_f| and costs ½ Σh a squared unit of length, and the set with the largest gain
    Σ|g_f| / √(Σh) for its cost holds the weights with the largest |g_f| / h: power 1. Needs a diagonal; with
    ``hessian: auto`` it is the Gauss–Newton estimate.

    Args:
        damping_ratio: ε as a multiple of the mean of h over all weights.
        power: of h + ε, above 0.
    """

    by_row = True
    needs = ("g_f", "h_diagonal")

    def __init__(self, damping_ratio: float = 0.1, power: float = 0.5) -> None:
        self.damping_ratio = check_positive(damping_ratio, "damping_ratio")
        self.power = check_positive(power, "power")

    def __call__(self, w: WeightStatistics) -> Tensor:
        """|g_f| / (h + damping_ratio · mean h)^power."""
        return w.g_f.abs().mul_((w.h_diagonal + self.damping_ratio * w.h_mean).pow_(-self.power))


class Signed(Score):
    """S = −g_r · g_f / h, ranked without absolute value: weights where forgetting does not fight retaining first.

    The second term of WAGLE's score, with its sign: moving along +g_f raises the retain loss at the rate g_r · g_f.
    """

    by_row = True
    needs = ("g_f", "g_r", "h")
    signed = True

    def __call__(self, w: WeightStatistics) -> Tensor:
        """−g_r · g_f / h."""
        return (w.g_r * w.g_f).div_(w.h).neg_()


class Magnitude(Score):
    """S = |θ| (magnitude pruning, arXiv 1506.02626). No pass over data is needed."""

    by_row = True
    needs = ()

    def __call__(self, w: WeightStatistics) -> Tensor:
        """|θ|."""
        return w.theta.abs()


class Wanda(Score):
    """S_ij = |θ_ij| · ‖x_j‖₂, x what enters the linear layer on the forget rows (Wanda, arXiv 2306.11695).

    Prompt and answer tokens count, padding does not. Only a forward pass is run. The paper ranks within each output
    row: ``scope: row``. Weights of no linear layer (norms, biases, embeddings) score 0; an embedding that is tied to
    the output layer has that layer's score.
    """

    by_row = True
    needs = ("activation",)

    def __call__(self, w: WeightStatistics) -> Tensor:
        """|θ| · ‖x‖₂, 0 outside linear layers."""
        return torch.zeros_like(w.theta) if w.activation is None else w.theta.abs() * w.activation


class Random(Score):
    """Uniform random numbers: the control every other score is compared with.

    Args:
        seed: of the numbers; those of a parameter depend on its name too.
    """

    needs = ()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, w: WeightStatistics) -> Tensor:
        """Uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, w.name))
        return torch.rand(w.theta.shape, generator=generator).to(w.theta.device)


class Modules(Score):
    """1 inside the chosen modules and layers, 0 outside. The mask is all that is inside; ``density`` is not used.

    Args:
        modules: ``mlp``, ``attn``, ``norm``, ``embed``, ``q_proj``, ``mlp.down_proj``, ... (see
            :func:`wagle_pl.masks.names.in_module`); any of them will do. None takes every module.
        layers: indices of transformer blocks: ``"3-7"``, ``"0,2,5-6"``, counted from 0, ends included. None takes
            every layer, and what is outside the blocks.

    Raises:
        WagleError: if ``layers`` cannot be read, or both are None.
    """

    by_row = True
    needs = ()

    def __init__(self, modules: Optional[list[str]] = None, layers: Optional[str] = None) -> None:
        if not modules and layers is None:
            raise WagleError("score Modules needs modules, layers or both")
        self.modules = modules
        self.layers = layers
        self._restriction = Restriction(modules=modules, layers=layers)
        if layers is not None:
            parse_layers(layers)  # refuses what cannot be read

    @property
    def label(self) -> str:
        """``modules-mlp-layers3-7``."""
        layers = [] if self.layers is None else [f"layers{self.layers}"]
        return "-".join(["modules", *(self.modules or []), *layers])

    def takes(self, name: str) -> bool:
        """Whether a parameter is inside."""
        return self._restriction.takes(name)

    def __call__(self, w: WeightStatistics) -> Tensor:
        """1 or 0."""
        return torch.full_like(w.theta, float(self.takes(w.name)))

    def share(self, shapes: Mapping[str, Sequence[int]]) -> Fraction:
        """Share of weights inside.

        Raises:
            WagleError: if the model lacks a module or a layer, naming those it has.
        """
        mask = self._restriction.mask(shapes)
        return Fraction(mask.count(), mask.total)
