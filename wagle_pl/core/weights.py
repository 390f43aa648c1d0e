"""A model's weights, whole or sharded over ranks (ZeRO-3): shapes, values, fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from wagle_pl.core import distributed

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def shapes_of(parameters: NamedParameters) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of the whole tensor if a parameter is sharded."""
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
def gathered(parameter: Tensor, from_rank_zero: bool = False) -> Iterator[Tensor]:
    """A parameter's whole weights inside the context; a collective if it is sharded.

    With ``from_rank_zero``, changes made on rank 0 are kept.
    """
    if not hasattr(parameter, "ds_id"):
        yield parameter.data
        return
    import deepspeed

    rank = 0 if from_rank_zero else None
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=rank):
        yield parameter.data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode while inside; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def assign(parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
    """Set a parameter to what ``read`` returns: numbers start to stop of the flattened tensor.

    A collective if it is sharded: each rank reads its shard. While it is gathered on every rank, or
    offloaded to a disk, rank 0 reads all of it.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(read(0, parameter.numel()).view(parameter.shape))
    elif in_shares(parameter):
        start, share = share_of(parameter)
        share.copy_(read(start, start + len(share)))
    else:
        with gathered(parameter, from_rank_zero=True) as weights:
            if distributed.rank() == 0:
                weights.copy_(read(0, weights.numel()).view(weights.shape))


def in_shares(parameter: nn.Parameter) -> bool:
    """Whether each rank has its shard of a parameter in memory: neither gathered nor on a disk."""
    return parameter.numel() != parameter.ds_numel and _holds_share(parameter)


def _holds_share(parameter: Tensor) -> bool:
    return parameter.ds_tensor.numel() == parameter.partition_numel()


def share_of(tensor: Tensor) -> tuple[int, Tensor]:
    """(start, values): this rank's share of a flattened tensor, without copying it.

    Under ZeRO-3, the shard that the rank holds, without padding; no public function returns it
    without gathering. Otherwise, one of equal parts of the whole.
    """
    rank = distributed.rank()
    if not hasattr(tensor, "ds_id"):
        size = -(-tensor.numel() // distributed.world_size())
        start = min(rank * size, tensor.numel())
        return start, tensor.detach().reshape(-1)[start : start + size]
    size, total, shard = tensor.partition_numel(), tensor.ds_numel, tensor.ds_tensor.detach()
    start = min(rank * size, total)
    if not _holds_share(tensor):
        with gathered(tensor) as weights:
            shard = weights.detach().reshape(-1)[start : start + size].clone()
    return start, shard[: min(size, total - start)]


# -- digests ---------------------------------------------------------------------------------------

#: How many numbers have a common digest: few enough for a processor's cache.
CHUNK = 1 << 17


@cache
def _keys(device: torch.device) -> Tensor:
    """(4 CHUNK,) odd int64: SplitMix64 (Steele, Lea, Flood 2014) of 1, 2, 3, ..."""
    key = np.arange(1, 4 * CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((key ^ (key >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(
        device
    )


def chunks_of(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` numbers, from number ``start`` of a tensor on, at the borders of its chunks;
    yields (first, end) of each piece.

    >>> list(chunks_of(CHUNK - 1, 3))
    [(0, 1), (1, 3)]
    """
    first = 0
    while first < count:
        end = min(count, first + CHUNK - (start + first) % CHUNK)
        yield first, end
        first = end


def digest(values: Tensor, start: int) -> Tensor:
    """What numbers of one chunk add to its digest: a 0-dim int64 tensor.

    Σ k_i w_i mod 2⁶⁴ over the 16-bit words w of the numbers, with fixed odd k_i for word i of the
    chunk (multilinear hashing; Carter and Wegman 1979). Ranks that hold parts of a chunk can thus
    add up their sums, each computed on the device that holds the numbers. A change of one word is
    always detected; any other change is missed with a probability of at most 2⁻⁴⁸, over random k.
    This protects from mistakes, not from a forger.

    Args:
        values: consecutive numbers of 2, 4 or 8 bytes, (n,).
        start: index of the first in the flattened tensor.
    """
    words = values.contiguous().view(torch.int16)
    keys, width = _keys(values.device), values.element_size() // 2
    at = start % CHUNK * width
    return (words * keys[at : at + len(words)]).sum()


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, and the digests of chunks of :data:`CHUNK` numbers, see
    :func:`digest`, in order. Collective.

    Each rank reads its own shard of the tensors, and digests are added up in one all-reduce of 8
    bytes per chunk: the result is the same for any number of ranks. Values are rounded to bfloat16
    first, so that a checkpoint has the same digest when loaded in bfloat16 or in float32.
    """
    header, digests = "", []
    for name, tensor in tensors:
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        header += f"{name} {shape}\n"
        start, part = share_of(tensor)
        sums = torch.zeros(-(-prod(shape) // CHUNK), dtype=torch.int64, device=part.device)
        for first, end in chunks_of(start, len(part)):
            rounded = part[first:end].to(torch.bfloat16)
            sums[(start + first) // CHUNK] = digest(rounded, start + first)
        digests.append(sums.cpu())
    total = distributed.all_reduce_sum(torch.cat(digests))
    return hashlib.sha256(header.encode() + total.numpy().tobytes()).hexdigest()


# -- fingerprints ----------------------------------------------------------------------------------

#: Keys of a configuration that do not change the logits of a model in evaluation mode: names, how
#: it is loaded and run, which tokens end a text, and what acts in training only.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*_token_id|.*drop.*|.*initializer.*|architectures|auto_map|transformers_version|.*dtype|"
    r"use_cache|return_dict|output_(attentions|hidden_states|router_logits)|tokenizer_class|id2label|"
    r"label2id|problem_type|chunk_size_feed_forward|(attn|experts)_implementation|"
    r"gradient_checkpointing|.*_aux_loss_.*|.*jitter.*"
)


def fingerprint(model: nn.Module) -> str:
    """Name a model by what it computes: :func:`weights_digest`, a hyphen, and 16 digits for the part
    of its configuration that changes its logits (epsilons, activations, RoPE, ...). Collective.

    Without a configuration, the digest of the weights alone.
    """
    weights, config = weights_digest(model.named_parameters()), getattr(model, "config", None)
    if config is None:
        return weights
    text = json.dumps(_with_effect(config.to_dict()), sort_keys=True, default=str)
    return f"{weights}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _with_effect(config: Any) -> Any:
    """A configuration without keys that have no effect; a key that is None or False counts as
    absent, since later versions of transformers add such keys."""
    if not isinstance(config, dict):
        return config
    items = ((str(key), value) for key, value in config.items())
    return {
        key: _with_effect(value)
        for key, value in items
        if value is not None and value is not False and not _WITHOUT_EFFECT.fullmatch(key)
    }


def mismatch(one: Optional[str], other: Optional[str]) -> Optional[str]:
    """In what two models differ by their fingerprints: ``weights``, ``configuration`` or None.

    What is unknown differs from nothing: a fingerprint, or the configuration's part, which files
    of earlier versions lack.
    """
    if not one or not other:
        return None
    (weights, _, config), (other_weights, _, other_config) = (
        text.partition("-") for text in (one, other)
    )
    if weights != other_weights:
        return "weights"
    return "configuration" if config and other_config and config != other_config else None
