"""Quantisation: coarser weights, and what their rounding undoes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.subject import Subject
from wagle_pl.evaluation.robustness.weights import quantise_, restored
from wagle_pl.lm.layers import linear_weights


class Quantise(Attack):
    """Round the linear layers' weights to few bits, and test again: rounding may undo small updates (arXiv 2410.16454).

    Weights only, per output channel, to the nearest level, and back to numbers: no special kernels, any device.

    Args:
        bits: each is tried.
        scheme: ``symmetric`` or ``asymmetric`` levels, see :func:`.weights.fake_quantise`.
        group_size: inputs that share a scale, e.g. 128; a whole output channel when null.
    """

    moves_weights = True

    def __init__(
        self,
        bits: Sequence[int] = (8, 4),
        scheme: Literal["symmetric", "asymmetric"] = "asymmetric",
        group_size: Optional[int] = None,
    ) -> None:
        self.bits = tuple(bits)
        self.scheme = scheme
        self.group_size = group_size

    def check(self, subject: Subject) -> None:
        """It needs weights that are whole, and options within their range."""
        super().check(subject)
        if not self.bits or not all(2 <= bits <= 16 for bits in self.bits):
            raise WagleError(f"quantise: bits must be 2 to 16, got {list(self.bits)}")
        if self.group_size is not None and self.group_size < 1:
            raise WagleError(f"quantise: group_size must be at least 1, got {self.group_size}")

    def attack(self, subject: Subject) -> Iterator[Finding]:
        """See :class:`Quantise`."""
        for bits in self.bits:
            with restored(weight for weight, _ in linear_weights(subject.lm, head=False)):
                quantise_(subject.lm, bits, self.scheme, self.group_size)
                yield from subject.compare(subject.every_row(), self.measures, f"{bits}bit")
