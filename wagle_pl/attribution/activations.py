"""Norms of the inputs of linear layers, collected by forward pre-hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from wagle_pl.attribution.sums import PIECE
from wagle_pl.core.weights import is_linear, parameter_shapes
from wagle_pl.lm.layers import expert_weights, is_transposed, linear_weights

log = logging.getLogger(__name__)


@contextmanager
def watch_inputs(
    model: nn.Module, mask: Tensor, add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Context of one forward pass (not of a backward pass, where gradient checkpointing repeats it)
    that reports Σ x² over real tokens of every input x of the model's linear layers and experts.

    Args:
        model: the model.
        mask: (B, T), 0 at tokens that do not count. A layer that runs on the last positions only
            uses its last columns; an input of another shape counts whole.
        add: called with (name of a weight, fp64 sum of squares) at each call of its layer; the sum
            broadcasts with the weight: (in,), (in, 1) where that is stored transposed,
            (experts, 1, in) or (experts, in, 1).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}

    def of_layer(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = _squares(_real(inputs[0].detach(), mask))
        add(names[layer.weight], squares[:, None] if is_transposed(layer) else squares)

    def of_experts(experts: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        # tokens, and the experts that each is dispatched to, in whatever way they are passed
        tokens, chosen, *_ = (*inputs, *options.values())
        tokens, chosen = (_real(x.detach().flatten(0, -2), mask) for x in (tokens, chosen))
        found = _expert_inputs(experts, tokens, chosen)
        for weight, squares in zip(expert_weights(experts), found, strict=True):
            add(names[weight], squares[:, :, None] if is_transposed(experts) else squares[:, None])

    handles = []
    for module in model.modules():
        if is_linear(module):
            handles.append(module.register_forward_pre_hook(of_layer))
        elif expert_weights(module):
            handles.append(module.register_forward_pre_hook(of_experts, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """(N, d) tokens of ``x``, (B, T', d) or (B · T, d), that ``mask``, (B, T), keeps; all of other
    shapes."""
    if x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] <= mask.shape[1]:
        x = x[mask[:, mask.shape[1] - x.shape[1] :].bool()]
    elif x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.reshape(-1).bool()]
    return x.reshape(-1, x.shape[-1])


def _squares(x: Tensor) -> Tensor:
    """(d,) Σ x² over tokens, (N, d), in fp64; some tokens are copied to it at a time."""
    rows = x.split(max(1, PIECE // x.shape[-1]))
    return sum(part.double().square().sum(0) for part in rows)


@torch.no_grad()
def _expert_inputs(experts: Any, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(experts, in) sums of squares of the inputs of each expert's two maps, ``up`` and ``down``,
    the second computed again as transformers does.

    Args:
        experts: the module.
        tokens: (N, d) its input.
        chosen: (N, k) experts of each token.
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
        before.append(_squares(x))
        between.append(_squares(hidden))
    return torch.stack(before), torch.stack(between)


def warn_of_unwatched(lm: nn.Module) -> None:
    """Warn of matrices whose inputs are not watched, if they are more than 1 % of the weights."""
    watched = {id(weight) for weight, _ in linear_weights(lm)}
    watched |= {id(module.weight) for module in lm.modules() if isinstance(module, nn.Embedding)}
    shapes = parameter_shapes(lm)
    parameters = dict(lm.named_parameters())
    unwatched = [n for n, s in shapes.items() if len(s) > 1 and id(parameters[n]) not in watched]
    share = sum(prod(shapes[name]) for name in unwatched) / sum(map(prod, shapes.values()))
    if share > 0.01:
        log.warning(
            "wanda: %.0f %% of the weights are in layers of unknown kinds (%s, ...): they score 0 "
            "and are selected last",
            100 * share,
            ", ".join(unwatched[:3]),
        )
