"""The step floor: no trained weight is left where rounding to a quantised form would undo its step."""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from torch import Tensor, nn

from wagle_pl.lm.layers import linear_weights
from wagle_pl.lm.quantised import (
    GGUF_BLOCK,
    NF4_BLOCK,
    affine,
    blocks_of,
    nf4_levels,
    rounded_to,
)
from wagle_pl.masks.bits import put_
from wagle_pl.masks.selected import SelectedWeights
from wagle_pl.unlearning.step_rules import Gradients

#: How far into the next bin a weight is moved, as a share of the distance between two bounds there.
INTO = 1 / 16


class Grid(NamedTuple):
    """The bins of a form for one matrix, whose scales are those of ``start``.

    A weight w is in bin b if w / scale + offset lies between bounds[b − 1] and bounds[b].
    """

    start: Tensor  # (groups, size), padded with zeros
    scale: Tensor  # (groups, 1)
    offset: Tensor  # (groups, 1)
    bounds: Tensor  # sorted
    is_symmetric: bool = True  # the largest absolute value gives the scale, not both ends

    @classmethod
    def of(cls, weights: Tensor, form: Union[int, str]) -> Grid:
        """The grid of (out, in) weights, see :mod:`wagle_pl.lm.quantised`."""
        size = NF4_BLOCK if form == "nf4" else GGUF_BLOCK
        size = weights.shape[-1] if isinstance(form, int) else size
        start = blocks_of(weights, size)
        tiny = torch.finfo(torch.float32).tiny
        top = start.abs().amax(1, keepdim=True)
        offset = torch.zeros_like(top)
        if isinstance(form, int):
            scale, offset = (of_rows[:, None] for of_rows in affine(start, form))
            steps = torch.arange(2**form - 1)
        elif form == "nf4":
            return cls(start, top.clamp(min=tiny), offset, nf4_levels(weights.device)[1])
        elif form == "q8_0":
            steps, scale = torch.arange(-127, 127), (top / 127).clamp(min=tiny)
        else:
            furthest = start.gather(1, start.abs().argmax(1, keepdim=True))
            scale = torch.where(top > 0, furthest / -8, tiny)
            steps = torch.arange(-8, 7)
        return cls(start, scale, offset, steps.to(top.device) + 0.5, isinstance(form, str))

    def bins(self, weights: Tensor) -> Tensor:
        return torch.bucketize(weights / self.scale + self.offset, self.bounds)

    def beyond(self, bins: Tensor, direction: Tensor) -> Tensor:
        """Values in the next bins, in a direction (±1) of the weights; outside of the grid at its
        ends."""
        ahead = direction * self.scale.sign() > 0
        first = torch.where(ahead, bins, bins - 1)  # the bound to cross, and the one after it
        last = len(self.bounds) - 1
        bound = self.bounds[first.clamp(0, last)]
        after = self.bounds[torch.where(ahead, first + 1, first - 1).clamp(0, last)]
        width = torch.where(after == bound, self.bounds[1] - self.bounds[0], (after - bound).abs())
        inside = bound + torch.where(ahead, width, -width) * INTO
        values = (inside - self.offset) * self.scale
        return torch.where((first < 0) | (first > last), direction * torch.inf, values)

    def keeps(self, weights: Tensor) -> Tensor:
        """Whether weights leave the scale of their group as it is: those that set it do not move,
        and no other is as far out."""
        least, greatest = self.start.amin(1, keepdim=True), self.start.amax(1, keepdim=True)
        if self.is_symmetric:
            greatest = torch.maximum(greatest, -least)
            least = -greatest
        sets_it = (self.start == least) | (self.start == greatest)
        return ~sets_it & (weights > least) & (weights < greatest)


def floored(
    start: Tensor,
    trained: Tensor,
    gradient: Tensor,
    form: Union[int, str],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(out, in) weights, each at ``start`` or in another bin of the form than there.

    A weight that training has moved to another bin stays. Another crosses the bound ahead of it, by
    a sixteenth of the next bin, if that costs less of the objective than returning to the start
    does (gradient · change) and is the smaller change; else it returns. Where the next bin is
    beyond the grid, or a weight would change the scale of its row or block, it returns: the result
    has the scales of the start.

    Args:
        start, trained: the weights before and after training.
        gradient: of the objective, at ``trained``.
        dtype: of the result's file, which its values are rounded to.
    """
    grid = Grid.of(start.float(), form)
    size = grid.start.shape[1]
    now, slope = blocks_of(trained.float(), size), blocks_of(gradient.float(), size)
    before = grid.bins(grid.start)
    crossing = grid.beyond(before, (now - grid.start).sign())
    crosses = slope * (crossing - grid.start) < 0  # the difference of the two costs
    crosses &= (crossing - now).abs() < (now - grid.start).abs()
    values = torch.where(crosses, crossing, grid.start)
    values = torch.where(grid.bins(now) != before, now, values).to(dtype).float()
    values = torch.where(grid.keeps(values), values, grid.start)
    values = values.view(-1)[: start.numel()].view(start.shape)
    crossed = rounded_to(values, form) != rounded_to(start.float(), form)
    return torch.where(crossed, values, start.float())


class StepFloor:
    """Applies :func:`floored` to a model whose weights are selected, once they are trained.

    Args:
        lm: the model, before its weights are selected.
        form: what it is to be rounded to.
    """

    def __init__(self, lm: nn.Module, form: Union[int, str]) -> None:
        self.form = form
        transposed = {id(weight): is_ for weight, is_ in linear_weights(lm, head=False)}
        named = lm.named_parameters()
        #: Name of a weight that is rounded -> whether it is stored transposed.
        self.rounded = {name: transposed[id(p)] for name, p in named if id(p) in transposed}

    @torch.no_grad()
    def apply(
        self, selected: SelectedWeights, gradient: Gradients, dtype: torch.dtype
    ) -> dict[str, int]:
        """Write values where they belong; returns how many weights moved before, and after."""
        counts = {"moved": 0, "left": 0}
        for name, is_transposed in self.rounded.items():
            tensor = selected.tensors.get(name)
            if tensor is None or tensor.values is None or tensor.theta0 is None:
                continue
            start = tensor.write().float().clone()
            trained = start.clone()
            put_(start, tensor.places(), tensor.theta0.float())
            put_(trained, tensor.places(), tensor.values)
            slope = tensor.placed(gradient[name].float())
            result = start.clone()
            dense = (result, start, trained, slope)
            matrices = [part if part.ndim == 3 else part[None] for part in dense]
            for parts in zip(*matrices, strict=True):
                out, before, after, steepness = (p.T if is_transposed else p for p in parts)
                out.copy_(floored(before, after, steepness, self.form, dtype))
            counts["moved"] += int((trained != start).sum())
            counts["left"] += int((result != start).sum())
            tensor.values.copy_(tensor.taken(result, tensor.values.dtype).view_as(tensor.values))
        selected.changed()
        return counts
