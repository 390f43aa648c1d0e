"""Selected entries of a tensor: taken, put back, and kept as halves. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
from torch import Tensor

#: Selected weights handled at a time on a CPU: few enough for the processor's cache, and enough
#: for two threads to share (a quarter of this takes 1.2 times as long).
CHUNK = 1 << 18

#: The same on a GPU, where few large operations are faster.
GPU_CHUNK = 1 << 24


def chunk_of(tensor: Tensor) -> int:
    """How many selected weights to handle at a time."""
    return CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


@torch.no_grad()
def take_(out: Tensor, dense: Tensor, places: Iterable[Tensor], add: bool = False) -> Tensor:
    """Write entries of a tensor into (n,) ``out``, or add them to it; returns ``out``.

    ``places`` are n places in the flattened tensor, in pieces. What is taken passes through one
    small buffer: memory that is new in every step costs more than the copy.
    """
    flat, start, buffer = dense.reshape(-1), 0, dense.new_empty(0)
    for index in places:
        part, start = out[start : start + len(index)], start + len(index)
        buffer = buffer if len(index) <= len(buffer) else flat.new_empty(len(index))
        taken = torch.index_select(flat, 0, index, out=buffer[: len(index)])
        part.add_(taken) if add else part.copy_(taken)
    return out


@torch.no_grad()
def put_(dense: Tensor, places: Iterable[Tensor], values: Tensor) -> None:
    """Write (n,) values into a contiguous tensor at n places, in pieces, rounded to its dtype."""
    flat, start = dense.view(-1), 0
    for index in places:
        part, start = values[start : start + len(index)], start + len(index)
        flat.index_copy_(0, index.long(), part.to(dense.dtype))


@torch.no_grad()
def split_halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 numbers of fp32 values, and what is lost, as int16.

    Of two equally near it is the larger in size. :func:`join_halves` gives the values back bit for
    bit, but for those that are not finite.
    """
    upper = values.to(torch.bfloat16)
    lower = values.view(torch.int32) - (upper.view(torch.int16).int() << 16)
    tie = lower == 1 << 15  # rounded to even, down: 16 bits hold no more than 2¹⁵ − 1
    upper = (upper.view(torch.int16) + tie).view(torch.bfloat16)
    return upper, (lower - (tie.int() << 16)).to(torch.int16)


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 values that :func:`split_halves` took apart."""
    return ((upper.contiguous().view(torch.int16).int() << 16) + lower.int()).view(torch.float32)


def place(dense: Tensor, selected: Optional[Tensor], values: Tensor) -> Tensor:
    """A new tensor with values at the selected places, all if None, in the dtype of the values."""
    if selected is None or selected.all():
        return values.view(dense.shape)
    return dense.to(values.device, values.dtype, copy=True).masked_scatter_(
        selected.to(values.device), values
    )
