"""The guarantee, checked: digests of the weights that must not move."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.masks import WeightMask


def frozen_digest(weights: Tensor, selected: Tensor) -> str:
    """SHA-256 of a tensor's bits with the selected weights set to zero.

    Args:
        weights: any shape and dtype.
        selected: bool, same shape.
    """
    frozen = weights.detach().masked_fill(selected.to(weights.device), 0).reshape(-1).cpu()
    return hashlib.sha256(memoryview(frozen.view(torch.uint8).numpy()).cast("B")).hexdigest()


class FrozenWeights:
    """Digests of the frozen weights of every tensor; about a second for a gigabyte of weights.

    Args:
        mask: selected weights.
        parameters: (name, parameter) pairs at θ₀.
    """

    def __init__(self, mask: WeightMask, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.mask = mask
        self.digests = {
            name: frozen_digest(parameter, mask[name]) for name, parameter in parameters
        }

    def check(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> str:
        """What to say of the guarantee: how many weights are as they were.

        Raises:
            WagleError: naming the first parameter of which a frozen weight has moved.
        """
        for name, parameter in parameters:
            if frozen_digest(parameter, self.mask[name]) != self.digests[name]:
                raise WagleError(
                    f"frozen weights of {name} moved by step {step}: the result is not written"
                )
        frozen = self.mask.total - self.mask.count()
        return f"{frozen:,} frozen weights are bit-identical to the base model's"
