"""Collectives over ``torch.distributed`` that are no-ops in a run of one process; seeds.

All ranks must call a collective, and in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wagle_pl.core.files import atomic_path

T = TypeVar("T")

# torch 2.13 renamed these two
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if is_distributed() else 0


def device() -> torch.device:
    """The device on which the process group expects tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(items: Iterable[T]) -> list[T]:
    """Collective: the items of all ranks, rank 0's first. They are pickled, so keep them small."""
    items = list(items)
    if not is_distributed():
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_zero(call: Callable[[], T]) -> T:
    """Collective: call a function on rank 0; every rank returns its result or raises its error."""
    if not is_distributed():
        return call()
    answer: list[object] = [None, None]
    if rank() == 0:
        try:
            answer[0] = call()
        except Exception as error:  # raised on every rank, so that none waits forever
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[1], Exception):
        raise answer[1]
    return answer[0]  # type: ignore[return-value]


def all_reduce_max(number: int) -> int:
    """Collective: the largest of the ranks' numbers."""
    if not is_distributed():
        return number
    largest = torch.tensor(number, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Collective: the sum of the ranks' tensors, on any device, written into ``tensor``."""
    if is_distributed():
        here = tensor.to(device())
        dist.all_reduce(here)
        tensor.copy_(here)
    return tensor


def reduce_scatter(tensor: Tensor) -> Tensor:
    """Collective: rank r gets rows r·n to (r + 1)·n of the sum of the ranks' (R·n, …) tensors."""
    if not is_distributed():
        return tensor
    share = tensor.new_empty((len(tensor) // world_size(), *tensor.shape[1:]))
    _reduce_scatter(share, tensor.contiguous())
    return share


def all_gather_tensor(share: Tensor) -> Tensor:
    """Collective: the ranks' (n, …) tensors concatenated to (R·n, …)."""
    if not is_distributed():
        return share
    gathered = share.new_empty((len(share) * world_size(), *share.shape[1:]))
    _all_gather(gathered, share.contiguous())
    return gathered


def all_gather_uneven(share: Tensor) -> Tensor:
    """Collective: the ranks' (n,) tensors concatenated, whatever their lengths."""
    lengths = all_gather([len(share)])
    padded = share.new_zeros(max(lengths))
    padded[: len(share)] = share
    parts = all_gather_tensor(padded).view(len(lengths), -1)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextmanager
def shared_output(path: Path, create: Callable[[Path], object] = Path.mkdir) -> Iterator[Path]:
    """Collective: a new temporary folder, or a file that ``create`` makes, on a disk that the ranks
    share. All ranks write into it inside the context; on leaving, it replaces ``path``.

    Raises:
        OSError: on all ranks, if one fails; nothing is replaced then.
    """
    with atomic_path(path) if rank() == 0 else nullcontext(path) as temporary:

        def make() -> Path:
            create(temporary)
            return temporary

        output = on_rank_zero(make)
        error: Optional[Exception] = None
        try:
            yield output
        except Exception as raised:
            error = raised
        problems = all_gather([] if error is None else [f"rank {rank()}: {error}"])
        if error is not None and not (is_distributed() and isinstance(error, OSError)):
            raise error
        if problems:
            raise OSError(problems[0]) from error
    on_rank_zero(lambda: None)  # no rank goes on before the output is in its place


def shutdown() -> None:
    """Destroy the process group at the end of a process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def stable_seed(*parts: Any) -> int:
    """A seed of 63 bits that is the same in every process, from the SHA-256 of the parts as text;
    ``hash`` differs between versions.

    >>> stable_seed(0, "model.norm.weight")
    3568567045360393619
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
