"""Norms of what enters linear layers, seen through forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def watch_inputs(model: nn.Module, add: Callable[[str, Tensor], None]) -> Iterator[Callable[[Tensor], None]]:
    """While inside, hand on Σ x² over real tokens of every ``nn.Linear`` input x.

    Leave the context before a backward pass: gradient checkpointing runs the forward pass again in it.

    Args:
        model: its linear layers are watched.
        add: called with (name of the layer's weight, (in_features,) fp64 sum of squares) at each call of a layer; a
            weight tied to another has the name by which ``named_parameters`` lists it.

    Yields:
        A function that takes the (B, T) attention mask of the batch about to run. A layer that is run on the last
        positions only, as the vocabulary projection is, is given the last columns of it. An input of another shape
        (tokens dealt to experts) counts whole.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    current: list[Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        add(names[layer.weight], _squared_norms(inputs[0].detach(), current[0]))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield lambda mask: current.__setitem__(slice(None), [mask])
    finally:
        for handle in handles:
            handle.remove()


def _squared_norms(x: Tensor, mask: Tensor) -> Tensor:
    """(in_features,) sum of squares over the tokens of ``x``, (B, T', in_features), that ``mask``, (B, T), keeps."""
    if x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] <= mask.shape[1]:
        x = x[mask[:, mask.shape[1] - x.shape[1] :].bool()]
    elif x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.reshape(-1).bool()]
    return x.reshape(-1, x.shape[-1]).double().square().sum(0)
