"""Ranks that work together: a few words over ``torch.distributed``, each of which is free on one device.

Every function here is a meeting of all ranks: all must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def together() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if together() else 0


def gather(items: Iterable[T]) -> list[T]:
    """The items of all ranks, in the order of ranks, on every rank. They are pickled on the way."""
    items = list(items)
    if not together():
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_rank_zero(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, on every rank: for files that only rank 0 may see.

    Raises:
        Exception: on every rank what ``make`` raises on rank 0, so that none waits for it.
    """
    if not together():
        return make()
    answer: list[object] = [None, None]
    if rank() == 0:
        try:
            answer[0] = make()
        except Exception as error:  # handed on to all ranks below
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[1], Exception):
        raise answer[1]
    return answer[0]  # type: ignore[return-value]


def most(number: int) -> int:
    """The largest of the ranks' numbers: how many passes all must run, when a pass is a meeting (ZeRO-3)."""
    if not together():
        return number
    counts = torch.tensor(number, device=device())
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts)


def add_up(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place and returned."""
    if together():
        here = tensor.to(device())
        dist.all_reduce(here)
        tensor.copy_(here)
    return tensor


def scatter_sum(tensor: Tensor) -> Tensor:
    """This rank's share of the sum of the ranks' tensors.

    Args:
        tensor: its first dimension a multiple of the number of ranks; rank r gets the r-th part of it.
    """
    if not together():
        return tensor
    tensor = tensor.contiguous()
    share = tensor.new_empty((len(tensor) // world_size(), *tensor.shape[1:]))
    (_NEW_SCATTER or dist.reduce_scatter_tensor)(share, tensor)
    return share


def gather_tensor(share: Tensor) -> Tensor:
    """The ranks' tensors, of one shape, one after the other along the first dimension, on every rank."""
    if not together():
        return share
    whole = share.new_empty((len(share) * world_size(), *share.shape[1:]))
    (_NEW_GATHER or dist.all_gather_into_tensor)(whole, share.contiguous())
    return whole


#: What torch calls the two from 2.13 on.
_NEW_SCATTER = getattr(dist, "reduce_scatter_single", None)
_NEW_GATHER = getattr(dist, "all_gather_single", None)


def device() -> torch.device:
    """Where the process group takes tensors from."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def leave() -> None:
    """Leave the other ranks, at the end of a process; not a meeting."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
