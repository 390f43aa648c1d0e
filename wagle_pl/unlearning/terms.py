"""``TermGradients``: the gradient of each term of an objective, computed on its own."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.masks.selected import Gradients as Taken
from wagle_pl.masks.selected import SelectedWeights
from wagle_pl.unlearning.step_rules import Gradients


class TermGradients:
    """Gradients of the terms of a step's losses, on one device.

    :meth:`propagate` computes a term's gradient, which frees its graph before the next term's is
    built, and puts a leaf in the term's place. :meth:`add_up` asks how much the loss depends on each
    leaf, whatever has computed the loss, and counts the term's gradient so many times.

    Args:
        selected: the weights whose gradients are computed.
        apart: keep a sum for each term, for a step rule, instead of adding up all of them.
    """

    def __init__(self, selected: SelectedWeights, apart: bool) -> None:
        self.selected = selected
        self.apart = apart
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._parts: list[tuple[str, Tensor, Taken]] = []
        self.totals: dict[str, Gradients] = {}  # by term; only if they are kept apart

    @property
    def values(self) -> dict[str, Tensor]:
        """Name of a tensor -> its selected weights, if it has any."""
        tensors = self.selected.tensors.items()
        return {name: tensor.values for name, tensor in tensors if tensor.values is not None}

    def propagate(self, name: str, term: Tensor) -> Tensor:
        """Compute the gradient of a term, a scalar; returns a leaf of the same value."""
        if not term.requires_grad:
            return term
        so_far = self.selected.take_gradients()
        gradient = self._taken(term)
        self.selected.add_gradients(so_far)
        leaf = term.detach().requires_grad_()
        self._parts.append((name, leaf, gradient))
        return leaf

    def add_up(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's terms to those of the step."""
        parts, self._parts = self._parts, []
        leaves = [leaf for _, leaf, _ in parts]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        factors = torch.autograd.grad(loss, leaves, **options) if leaves else ()
        for (name, _, gradient), factor in zip(parts, factors, strict=True):
            if factor is not None:
                self._count(name, gradient, factor)

    def add_rest(self) -> None:
        """Set aside what the loss had beside its terms, once its backward pass is done."""
        if self.apart:
            self._count("rest", self.selected.take_gradients())

    def of(self, loss: Tensor, again: bool = False) -> Gradients:
        """The gradient of a loss of one's own; ``again`` keeps its graph for another."""
        return self._filled(self._taken(loss, again))

    def _taken(self, loss: Tensor, again: bool = False) -> Taken:
        plain = torch.autocast(loss.device.type, enabled=False)
        with plain, self.selected.gradients_in_place():
            loss.backward(retain_graph=again)
        return self.selected.take_gradients()

    def _count(self, name: str, gradient: Taken, factor: Optional[Tensor] = None) -> None:
        if not self.apart:
            self.selected.add_gradients(gradient, factor)
        elif any(taken is not None for taken, _ in gradient.values()):
            add(self.totals.setdefault(name, {}), self._filled(gradient), factor)

    def _filled(self, gradient: Taken) -> Gradients:
        """A gradient of all selected weights, 0 where it is None."""
        return {
            name: torch.zeros_like(values) if gradient[name][0] is None else gradient[name][0]
            for name, values in self.values.items()
        }


def add(total: Gradients, other: Gradients, factor: Optional[Tensor] = None) -> None:
    """Add a gradient, times a factor, to another, in place."""
    for name, gradient in other.items():
        gradient = gradient if factor is None else gradient.mul_(factor)
        total[name] = total[name].add_(gradient) if name in total else gradient
