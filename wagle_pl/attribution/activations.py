"""Norms of what enters linear layers, seen through forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wagle_pl.core.weights import is_linear
from wagle_pl.lm.layers import expert_weights, is_transposed


@contextmanager
def watch_inputs(
    model: nn.Module, add: Callable[[str, Tensor], None]
) -> Iterator[Callable[[Tensor], None]]:
    """While inside, hand on Σ x² over real tokens of every input x of the model's linear maps.

    Leave the context before a backward pass: gradient checkpointing runs the forward pass again in it.

    Args:
        model: its linear layers and experts (:mod:`wagle_pl.lm.layers`) are watched.
        add: called with (name of a weight, fp64 sum of squares) at each call of its layer; the sum has the shape in
            which it multiplies the weight: (in,), (in, 1) where that lies transposed, (experts, 1, in) or
            (experts, in, 1). A weight tied to another has the name by which ``named_parameters`` lists it.

    Yields:
        A function that takes the (B, T) attention mask of the batch about to run. A layer that is run on the last
        positions only, as the vocabulary projection is, is given the last columns of it. An input of another shape
        (tokens dealt to experts) counts whole.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    current: list[Tensor] = []

    def of_layer(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Of a layer with one weight."""
        squares = _real(inputs[0].detach(), current[0]).double().square().sum(0)
        add(names[layer.weight], squares[:, None] if is_transposed(layer) else squares)

    def of_experts(experts: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Of a block's experts: tokens, and the experts that each goes to, in whatever way they are passed."""
        tokens, chosen, *_ = (*inputs, *options.values())
        found = _expert_inputs(
            experts, *(_real(x.detach().flatten(0, -2), current[0]) for x in (tokens, chosen))
        )
        for weight, squares in zip(expert_weights(experts), found, strict=True):
            add(names[weight], squares[:, :, None] if is_transposed(experts) else squares[:, None])

    handles = []
    for module in model.modules():
        if is_linear(module):
            handles.append(module.register_forward_pre_hook(of_layer))
        elif expert_weights(module):
            handles.append(module.register_forward_pre_hook(of_experts, with_kwargs=True))
    try:
        yield lambda mask: current.__setitem__(slice(None), [mask])
    finally:
        for handle in handles:
            handle.remove()


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """(N, d) tokens of ``x``, (B, T', d) or (B · T, d), that ``mask``, (B, T), keeps; all of other shapes."""
    if x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] <= mask.shape[1]:
        x = x[mask[:, mask.shape[1] - x.shape[1] :].bool()]
    elif x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.reshape(-1).bool()]
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def _expert_inputs(experts: Any, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of what enters each expert's two maps: (experts, in) of ``up``, (experts, in) of ``down``.

    The second input is computed again, as transformers does between the two.

    Args:
        experts: the module.
        tokens: (N, d) its input.
        chosen: (N, k) which experts each token goes to.
    """
    up, _ = expert_weights(experts)
    before, between = [], []
    for expert in range(len(up)):
        x = tokens[(chosen == expert).any(-1)]
        hidden = x @ (up[expert] if is_transposed(experts) else up[expert].T)
        if experts.has_bias:
            bias = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
            hidden = hidden + getattr(experts, bias)[expert]
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        before.append(x.double().square().sum(0))
        between.append(hidden.double().square().sum(0))
    return torch.stack(before), torch.stack(between)
