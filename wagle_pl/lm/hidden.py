"""Outputs of transformer blocks, taken while a model runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.masks.names import layer_of


def blocks(lm: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, first to last.

    Raises:
        WagleError: if there are none under a known name.
    """
    lists = [
        m
        for name, m in lm.named_modules()
        if isinstance(m, nn.ModuleList) and layer_of(f"{name}.0") is not None
    ]
    if not lists:
        raise WagleError(
            f"no list of transformer blocks is found in a {type(lm).__name__}: hidden states need one"
        )
    return list(max(lists, key=len))


def check_layer(lm: nn.Module, layer: int, option: str) -> None:
    """Refuse a block that a model lacks.

    Raises:
        WagleError: saying the range.
    """
    last = len(blocks(lm)) - 1
    if not 0 <= layer <= last:
        raise WagleError(
            f"{option} must be from 0 to {last}, the last block of this model; got {layer}"
        )


@contextmanager
def capture(lm: Any, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Keep the outputs of some blocks while the context lasts.

    Args:
        lm: a model; unused without layers.
        layers: blocks, counted from 0.

    Yields:
        Block -> (B, T, d) output of its latest run; filled while the model runs.
    """
    hidden: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks(lm)[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()
