"""Scores: how much each weight matters for forgetting, given what one gradient pass saw of it.

To write one's own, subclass :class:`Score`, say what it ``needs`` and override ``__call__``; give its class path as
``--model.score``::

    class Product(Score):
        needs = ("g_f", "g_r")

        def __call__(self, w):
            return w.g_f * w.g_r
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class WeightStatistics:
    """What is known of the weights of one parameter; tensors have its shape, in fp32. Unless a score ``needs`` a field
    it is None.

    Attributes:
        name: of the parameter.
        theta: θ₀.
        g_f: gradient of the forget loss, oriented so that forgetting moves along +g_f.
        g_r: gradient of the retain loss.
        h: diagonal Hessian of the retain loss: one number (0-dim) or one a weight, above zero.
    """

    name: str
    theta: Tensor
    g_f: Optional[Tensor] = None
    g_r: Optional[Tensor] = None
    h: Optional[Tensor] = None


class Score:
    """One number a weight; the mask takes the weights with the largest absolute value."""

    #: Fields of :class:`WeightStatistics` that the score reads, beside ``theta``.
    needs: tuple[str, ...] = ("g_f",)

    def __call__(self, w: WeightStatistics) -> Tensor:
        """Scores of one parameter, in its shape. Override this."""
        raise TypeError(f"{type(self).__name__} must override __call__")


class Wagle(Score):
    """S = (θ − g_r / h) · g_f (WAGLE, arXiv 2410.17509, equation 8).

    To first order, the change of the forget loss when the weight is pruned and the others re-fit the retain loss.
    """

    needs = ("g_f", "g_r", "h")

    def __call__(self, w: WeightStatistics) -> Tensor:
        return (w.theta - w.g_r / w.h) * w.g_f


class Random(Score):
    """Uniform random numbers: the control every other score is compared with.

    Args:
        seed: of the numbers; those of a parameter depend on its name too.
    """

    needs = ()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, w: WeightStatistics) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {w.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(w.theta.shape, generator=generator).to(w.theta.device)
