"""Parts of a model: its linear maps, however it stores them (``nn.Linear``, GPT-2's ``Conv1D``, experts in one tensor),
and its blocks."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Optional

from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a ``weight`` of its own."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer, or a block's experts, store weights as (in, out), not as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def expert_weights(module: nn.Module) -> Optional[tuple[nn.Parameter, nn.Parameter]]:
    """(up, down) of a module that holds all experts of a block, each (experts, out, in) or (experts, in, out).

    ``up`` holds the gate too where there is one. None for other modules. Weights may be spread over ranks (ZeRO-3).
    """
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    pair = (up, getattr(module, "down_proj", None))
    if not hasattr(module, "is_transposed") or not all(
        isinstance(weight, nn.Parameter) for weight in pair
    ):
        return None
    return (
        pair
        if all(len(getattr(weight, "ds_shape", weight.shape)) == 3 for weight in pair)
        else None
    )


def linear_weights(lm: Any, head: bool = True) -> list[tuple[nn.Parameter, bool]]:
    """Weights of all linear maps, each once, with whether it lies transposed.

    Args:
        lm: a Hugging Face causal language model.
        head: with the output head, and so the embeddings tied to it.
    """
    found: dict[int, tuple[nn.Parameter, bool]] = {}
    for module in lm.modules():
        weights = (module.weight,) if is_linear(module) else expert_weights(module) or ()
        found |= {id(weight): (weight, is_transposed(module)) for weight in weights}
    output = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if output is not None and not head:
        found.pop(id(output.weight), None)
    return list(found.values())


def recompute_blocks(lm: Any) -> None:
    """Compute each block's activations again in the backward pass, and keep only what enters it; in place.

    This works in evaluation mode too. The switch that transformers has works in training mode alone, which would turn
    dropout on.

    Args:
        lm: a Hugging Face causal language model.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        log.warning(
            "gradient_checkpointing: %s has no blocks that can be computed again; all activations are kept",
            type(lm).__name__,
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
