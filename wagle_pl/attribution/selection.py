"""Exact selection of the highest-ranked share of weights: no sort of N, no gather of N, no second copy of N.

A float's bits, read as an integer, order like the float. Two passes of counting, over the upper and then the lower
sixteen bits, find the exact value of the k-th largest; a last pass writes the bits. Counts of several ranks or shards
add up, so the same code serves any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wagle_pl.masks import pack_bits
from wagle_pl.utilities import WagleError

CHUNK = 1 << 20  # weights looked at at a time: the only extra memory

_HALF = 1 << 16
_FIRST_INFINITE = 0x7F800000


class Threshold(NamedTuple):
    """The k-th largest key, and how many weights of just this key are taken (lowest index first)."""

    key: int
    ties: int


def order_keys(scores: Tensor, absolute: bool = True) -> Tensor:
    """int32 keys that order like the scores (or like their absolute values); equal scores have equal keys.

    Args:
        scores: float32, any shape.
        absolute: rank by absolute value.

    >>> order_keys(torch.tensor([-2.0, 1.0])).argmax(), order_keys(torch.tensor([-2.0, 1.0]), absolute=False).argmax()
    (tensor(0), tensor(1))
    """
    if absolute:
        return scores.abs().view(torch.int32)
    bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0: the two are equal scores
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def find_threshold(
    scores: Callable[[], Iterable[tuple[str, Tensor]]],
    k: int,
    absolute: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Threshold:
    """The key of the k-th largest score.

    Args:
        scores: called for each pass; yields (parameter name, float32 scores), every time the same.
        k: how many weights are to be taken, at least 1 and at most their number.
        absolute: rank by absolute value.
        reduce: adds up int64 counts over shards (an all-reduce); the identity on one device.

    Raises:
        WagleError: if a score is NaN or infinite, naming the parameter.
    """

    def count(bins: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(_HALF, dtype=torch.int64)
        for name, tensor in scores():
            for chunk in tensor.reshape(-1).split(CHUNK):
                total += torch.bincount(bins(order_keys(chunk, absolute)), minlength=_HALF).cpu()
            if total[(_FIRST_INFINITE >> 16) + _HALF // 2 :].any():
                raise WagleError(f"scores of {name} are not finite: the gradients overflowed or the Hessian is zero")
        return reduce(total)

    upper = count(lambda keys: (keys >> 16) + _HALF // 2)
    bin_, above = _descend(upper, k)
    high = bin_ - _HALF // 2
    lower = count_lower(scores, high, absolute, reduce)
    low, above_low = _descend(lower, k - above)
    return Threshold((high << 16) | low, k - above - above_low)


def count_lower(
    scores: Callable[[], Iterable[tuple[str, Tensor]]],
    high: int,
    absolute: bool,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Counts of the lower sixteen bits of the keys whose upper bits are ``high``."""
    total = torch.zeros(_HALF, dtype=torch.int64)
    for _, tensor in scores():
        for chunk in tensor.reshape(-1).split(CHUNK):
            keys = order_keys(chunk, absolute)
            total += torch.bincount(keys[(keys >> 16) == high] & (_HALF - 1), minlength=_HALF).cpu()
    return reduce(total)


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th largest lies, and how many lie in higher bins."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above


def select(
    scores: Callable[[], Iterable[tuple[str, Tensor]]], density: float, absolute: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Take exactly ⌊density · N⌋ weights, those of the largest score; ties go to the lowest index in parameter order.

    Args:
        scores: called for each pass; yields (parameter name, float32 scores of any shape), every time the same.
        density: share of weights, in (0, 1].
        absolute: rank by absolute value.

    Yields:
        (parameter name, packed bits), see :func:`wagle_pl.masks.pack_bits`.

    Raises:
        WagleError: if density is outside (0, 1] or takes no weight, or a score is NaN or infinite.
    """
    check_density(density)
    total = sum(tensor.numel() for _, tensor in scores())
    k = int(density * total)
    if k == 0:
        raise WagleError(f"density {density} of {total} weights selects none; raise it")
    threshold = find_threshold(scores, k, absolute)
    ties = threshold.ties
    for name, tensor in scores():
        parts = []
        for chunk in tensor.reshape(-1).split(CHUNK):
            keys = order_keys(chunk, absolute)
            taken = keys > threshold.key
            if ties:
                equal = (keys == threshold.key).nonzero().view(-1)[:ties]
                taken[equal] = True
                ties -= len(equal)
            parts.append(pack_bits(taken))
        yield name, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def check_density(density: float) -> None:
    """Raise :class:`WagleError` if ``density`` is outside (0, 1]."""
    if not 0 < density <= 1:
        raise WagleError(f"density is the share of weights selected and must be in (0, 1], got {density}")
