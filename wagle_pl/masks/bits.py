"""Bits of weights in bytes: eight weights a byte, lowest index in the lowest bit, padding bits 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # weights drawn at a time; a multiple of 8


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


def iter_places(packed: Tensor, size: int, chunk: int) -> Iterator[Tensor]:
    """int64 places of the set bits among ``size`` packed ones, for about ``chunk`` bits at a time.

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
    """Number of set bits."""
    return int(np.bitwise_count(packed.cpu().numpy()).sum(dtype=np.int64))


def filled_bits(size: int, value: bool) -> Tensor:
    """Packed bits of ``size`` weights, all alike."""
    packed = torch.full(((size + 7) // 8,), 255 if value else 0, dtype=torch.uint8)
    if value and size % 8:
        packed[-1] = (1 << size % 8) - 1
    return packed


def random_bits(sizes: Mapping[str, int], k: int, seed: int) -> dict[str, Tensor]:
    """Packed bits of exactly ``k`` weights, every set of ``k`` of them equally likely.

    Each weight is drawn on its own with probability k / N; then the few too many (or too few) are
    taken back (or added), uniformly among those selected (or not). Given their number the drawn are
    uniform, so the result is too. Beyond the bits this needs O(CHUNK + √N) memory.
    """
    generator = np.random.default_rng(seed)
    total, drawn = sum(sizes.values()), 0
    packed = {name: np.zeros((size + 7) // 8, dtype=np.uint8) for name, size in sizes.items()}
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
