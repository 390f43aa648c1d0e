"""Parts of a model: its linear maps, however they are stored, its blocks and their outputs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer, or a block's experts, stores weights as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def expert_weights(module: nn.Module) -> Optional[tuple[nn.Parameter, nn.Parameter]]:
    """(up, down) of a module with all experts of a block, each (experts, out, in) or transposed.

    ``up`` also holds the gate, if there is one. None for other modules. Weights may be sharded over
    ranks (ZeRO-3).
    """
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    pair = (up, getattr(module, "down_proj", None))
    experts = hasattr(module, "is_transposed") and all(
        isinstance(weight, nn.Parameter) and len(getattr(weight, "ds_shape", weight.shape)) == 3
        for weight in pair
    )
    return pair if experts else None


def linear_weights(lm: PreTrainedModel, head: bool = True) -> list[tuple[nn.Parameter, bool]]:
    """Weights of all linear maps, each once, and whether each is stored transposed.

    Args:
        head: include the output head, and with it the embeddings tied to it.
    """
    maps: dict[int, tuple[nn.Parameter, bool]] = {}
    for module in lm.modules():
        weights = (module.weight,) if is_linear(module) else expert_weights(module) or ()
        maps |= {id(weight): (weight, is_transposed(module)) for weight in weights}
    output = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if output is not None and not head:
        maps.pop(id(output.weight), None)
    return list(maps.values())


def recompute_blocks(lm: PreTrainedModel) -> None:
    """Recompute each block's activations in the backward pass; in place.

    transformers' own switch works only in training mode, which would turn dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        message = "gradient_checkpointing: %s has no blocks that can be computed again; all "
        log.warning(message + "activations are kept", type(lm).__name__)
    for block in layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(lm: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, first to last: its longest outermost ``nn.ModuleList``."""
    lists = {name: m for name, m in lm.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [[*m] for name, m in lists.items() if not any(name.startswith(f"{n}.") for n in lists)]
    if not outer:
        raise WagleError(f"a {type(lm).__name__} has no list of blocks, which hidden states need")
    return max(outer, key=len)


def check_layer(lm: nn.Module, layer: int, option: str) -> None:
    """Raise an error if a model has no such block."""
    last = len(blocks(lm)) - 1
    if not 0 <= layer <= last:
        must = f"must be from 0 to {last}, the last block of this model"
        raise WagleError(f"{must}, got {layer}", option=option)


@contextmanager
def capture(lm: PreTrainedModel, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Keep the outputs of some blocks, counted from 0, while the context lasts.

    Yields:
        Block -> (B, T, d) output of its latest run; filled while the model runs.
    """
    hidden: dict[int, Tensor] = {}

    def keep(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden[layer] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for i in layers:
            hooks.enter_context(blocks(lm)[i].register_forward_hook(partial(keep, i)))
        yield hidden
