"""A model's weights, whole or sharded over ranks (ZeRO-3): shapes, values, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wagle_pl.core import distributed

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def shapes_of(parameters: NamedParameters) -> dict[str, tuple[int, ...]]:
    """Name -> shape, whole where parameters are sharded."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, in parameter order, tied weights once."""
    return shapes_of(model.named_parameters())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a ``weight`` of its own."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's files."""
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


@contextmanager
def gathered(parameter: nn.Parameter, from_rank_zero: bool = False) -> Iterator[Tensor]:
    """A parameter's weights, whole, while inside; a collective if it is sharded.

    Changes are kept if ``from_rank_zero``: those of rank 0.
    """
    if not hasattr(parameter, "ds_id"):
        yield parameter.data
        return
    import deepspeed

    rank = 0 if from_rank_zero else None
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=rank):
        yield parameter.data


def iter_gathered(parameters: NamedParameters) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weights), one parameter at a time; a collective if they are sharded."""
    for name, parameter in parameters:
        with gathered(parameter) as weights:
            yield name, weights


@torch.no_grad()
def assign(parameter: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Set a parameter to the whole tensor that ``read`` gives; a collective, in which rank 0
    reads, if it is sharded."""
    with gathered(parameter, from_rank_zero=True) as weights:
        if not hasattr(parameter, "ds_id") or distributed.rank() == 0:
            weights.copy_(read())


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name a model by its content: SHA-256 over names, shapes and values in parameter order.

    Values are rounded to bfloat16 first, so that a checkpoint has one fingerprint whether it is
    loaded in bfloat16 or in float32.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        rounded = tensor.detach().to(torch.bfloat16).contiguous().cpu()
        digest.update(memoryview(rounded.view(torch.int16).numpy()).cast("B"))
    return digest.hexdigest()
