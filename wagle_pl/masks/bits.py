"""Packed bits, one per weight, and the tensor entries that they select: pure functions of tensors.

A byte holds the bits of eight weights, lowest index in the lowest bit; padding bits are 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wagle_pl.core.errors import WagleError

CHUNK = 1 << 20  # weights drawn at a time; a multiple of 8

#: Selected weights handled at a time on a CPU: few enough to fit the processor's cache, and enough
#: for two threads (a quarter of this takes 1.2 times as long).
CPU_CHUNK = 1 << 18

#: The same on a GPU, where few large operations are faster.
GPU_CHUNK = 1 << 24

#: Bytes per entry -> integer dtype of that size.
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into (ceil(n / 8),) uint8.

    >>> pack_bits(torch.tensor([True, False, False, True]))
    tensor([9], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().reshape(-1).cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack_bits` packed, on the device of ``packed``."""
    shape = tuple(shape)
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) & powers) != 0).view(-1)[: prod(shape)].view(shape)


def unpack_part(packed: Tensor, start: int, stop: int) -> Tensor:
    """(stop − start,) bool: bits ``start`` to ``stop`` of the packed; reads only their bytes."""
    first = start // 8
    bits = unpack_bits(packed[first : (stop + 7) // 8], [max(0, stop - 8 * first)])
    return bits[start - 8 * first :]


def iter_places(packed: Tensor, size: int, chunk: int) -> Iterator[Tensor]:
    """int64 positions of the set bits among ``size`` packed bits, about ``chunk`` bits at a time.

    >>> list(iter_places(torch.tensor([9], dtype=torch.uint8), 4, 8))
    [tensor([0, 3])]
    """
    for start in range(0, size, 8 * (chunk // 8)):
        piece = packed[start // 8 : start // 8 + chunk // 8]
        bits = unpack_bits(piece, [min(8 * len(piece), size - start)])
        if bits.device.type == "cpu":  # several times as fast as torch's nonzero
            yield torch.from_numpy(np.flatnonzero(bits.numpy())) + start
        else:
            yield bits.nonzero().view(-1) + start


def count_bits(packed: Tensor) -> int:
    parts = packed.cpu().split(CHUNK)
    return sum(int(np.bitwise_count(part.numpy()).sum(dtype=np.int64)) for part in parts)


def filled_bits(size: int, value: bool) -> Tensor:
    """Packed bits of ``size`` weights, all alike."""
    packed = torch.full(((size + 7) // 8,), 255 if value else 0, dtype=torch.uint8, device="cpu")
    if value and size % 8:
        packed[-1] = (1 << size % 8) - 1
    return packed


def random_bits(sizes: Mapping[str, int], k: int, seed: int) -> dict[str, Tensor]:
    """Packed bits of exactly ``k`` weights, every set of ``k`` of them equally likely.

    Each weight is first selected independently with probability k / N. The surplus is then removed
    (or what is missing added) uniformly among the selected (or other) weights. Given its size, the
    first selection is uniform, so the result is too. It needs O(CHUNK + √N) memory plus the bits.
    """
    generator = np.random.default_rng(seed)
    total, drawn = sum(sizes.values()), 0
    packed: dict[str, NDArray[np.uint8]] = {
        n: np.zeros((s + 7) // 8, np.uint8) for n, s in sizes.items()
    }
    pieces = [
        (packed[name][start // 8 : (start + CHUNK) // 8], min(CHUNK, size - start))
        for name, size in sizes.items()
        for start in range(0, size, CHUNK)
    ]
    for piece, n in pieces:
        bits = generator.random(n, dtype=np.float32) < k / total
        drawn += int(bits.sum())
        piece[:] = np.packbits(bits, bitorder="little")
    surplus = drawn > k
    among = drawn if surplus else total - drawn
    ranks = np.sort(generator.choice(among, abs(drawn - k), replace=False))
    for piece, n in pieces:
        if not len(ranks):
            break
        bits = np.unpackbits(piece, count=n, bitorder="little")
        eligible = np.flatnonzero(bits == surplus)
        here = np.searchsorted(ranks, len(eligible))
        bits[eligible[ranks[:here]]] ^= 1
        piece[:] = np.packbits(bits, bitorder="little")
        ranks = ranks[here:] - len(eligible)
    return {name: torch.from_numpy(bits) for name, bits in packed.items()}


# -- selected entries of a tensor ------------------------------------------------------------------


def chunk_of(tensor: Tensor) -> int:
    """How many selected weights to handle at a time."""
    return CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK


class Lines(NamedTuple):
    """Whole rows (axis 0) or columns (axis 1) of a matrix, by their int64 indices."""

    axis: int
    indices: Tensor


#: Entries of a tensor: positions in the flattened tensor, in pieces; None for all, in its shape.
Places = Optional[Union[Iterable[Tensor], Lines]]


def lines_of(packed: Tensor, shape: Iterable[int]) -> Optional[Lines]:
    """The rows or columns of a matrix that packed bits select; None if they select anything else.

    >>> lines_of(pack_bits(torch.tensor([[False, True], [False, True]])), (2, 2))
    Lines(axis=1, indices=tensor([1]))
    """
    if len(shape := tuple(shape)) != 2:
        return None
    bits = unpack_bits(packed, shape)
    for axis in (0, 1):
        line = bits.select(1 - axis, 0)
        if torch.equal(bits, line.unsqueeze(1 - axis).expand(shape)):
            return Lines(axis, line.nonzero().view(-1))
    return None


@torch.no_grad()
def take_(out: Tensor, dense: Tensor, places: Places, add: bool = False) -> Tensor:
    """Write entries of a tensor into (n,) ``out``, or add them to it; returns ``out``.

    The entries pass through one small buffer, since allocating memory in every step would cost more
    than the copy.
    """
    if isinstance(places, Lines):
        dense, places = dense.index_select(places.axis, places.indices), None
    if places is None:
        return out.add_(dense) if add else out.copy_(dense)
    # torch selects from integers in three quarters of the time that it takes for floats
    integer = _INTEGER[dense.element_size()]
    flat, direct = dense.reshape(-1).view(integer), not add and out.dtype == dense.dtype
    start, buffer = 0, flat.new_empty(0)
    for index in places:
        part, start = out[start : start + len(index)], start + len(index)
        buffer = buffer if direct or len(index) <= len(buffer) else flat.new_empty(len(index))
        into = part.view(integer) if direct else buffer[: len(index)]
        taken = torch.index_select(flat, 0, index, out=into).view(dense.dtype)
        if not direct:
            part.add_(taken) if add else part.copy_(taken)
    return out


@torch.no_grad()
def put_(dense: Tensor, places: Places, values: Tensor) -> None:
    """Write (n,) values, rounded to its dtype, into n entries of a contiguous tensor."""
    if isinstance(places, Lines):
        dense.index_copy_(places.axis, places.indices, values.to(dense.dtype))
        return
    if places is None:
        dense.copy_(values)
        return
    flat, start = dense.view(-1), 0
    for index in places:
        part, start = values[start : start + len(index)], start + len(index)
        flat.index_copy_(0, index.long(), part.to(dense.dtype))


def place(dense: Tensor, selected: Optional[Tensor], values: Tensor) -> Tensor:
    """A copy of a tensor with values at the selected places (all if None), in the values' dtype.

    Raises:
        WagleError: if there are not as many values as places.
    """
    places = dense.numel() if selected is None else int(selected.sum())
    if values.numel() != places:
        raise WagleError(f"there are {values.numel()} values for {places} selected weights")
    if places == dense.numel():
        return values.view(dense.shape)
    return dense.to(values.device, values.dtype, copy=True).masked_scatter_(
        selected.to(values.device), values
    )
