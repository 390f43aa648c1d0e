"""Exact selection of the highest-ranked share of weights: no sort of N, no gather of N, no second copy of N.

A float's bits, read as an integer, order like the float. Two passes of counting, over the upper and then the lower
sixteen bits, find the exact value of the k-th in order; a last pass writes the bits. Counts of several ranks or shards
add up, so the same code serves any of them, and several densities share their passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor

from wagle_pl.attribution.shards import Shard
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.masks.bits import count_bits, pack_bits

CHUNK = 1 << 18  # weights looked at at a time, a multiple of 8: the only extra memory

_HALF = 1 << 16
_OFFSET = _HALF // 2  # the upper half of a key is signed; bins count from 0
_INFINITE = 0x7F80  # upper sixteen bits of the first float that is not finite
_NONE = 2**31 - 1  # a key above that of any finite score

Scope = Literal["global", "tensor", "row"]

#: (parameter name, its float32 scores in its shape) for every parameter that takes part, in parameter order. Called
#: once a pass; every time the same. With several ranks each gives the scores of its rows.
Scores = Callable[[], Iterable[tuple[str, Tensor]]]

#: Adds up int64 counts over ranks; the identity on one device.
Reduce = Callable[[Tensor], Tensor]


class Ranking(NamedTuple):
    """How scores become an order: by absolute value or not, from the highest or from the lowest."""

    absolute: bool = True
    low: bool = False


HIGHEST = Ranking()


class Threshold(NamedTuple):
    """Weights whose key is above ``key`` are taken, and the first ``ties`` of those with just this key."""

    key: int
    ties: int


def check_density(density: float) -> None:
    """Raise :class:`WagleError` if ``density`` is outside (0, 1]."""
    if not 0 < density <= 1:
        raise WagleError(
            f"density is the share of weights selected and must be in (0, 1], got {density}"
        )


def exact_count(density: Union[float, Fraction], total: int) -> int:
    """⌊density · total⌋ of the number as it is written: in binary, 0.29 of 100 would be 28.

    >>> exact_count(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    share = density if isinstance(density, Fraction) else Fraction(str(density))
    return share.numerator * total // share.denominator


def order_keys(scores: Tensor, ranking: Ranking = HIGHEST) -> Tensor:
    """int32 keys that order as the ranking says: what is to be taken first has the largest; equal scores, equal keys.

    Args:
        scores: float32, any shape.
        ranking: the order.

    >>> order_keys(torch.tensor([-2.0, 1.0])).argmax(), order_keys(torch.tensor([-2.0, 1.0]), Ranking(False)).argmax()
    (tensor(0), tensor(1))
    """
    if ranking.absolute:
        keys = scores.abs().view(torch.int32)
    else:
        bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0: the two are equal scores
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ~keys if ranking.low else keys


def select(
    scores: Scores,
    density: float,
    ranking: Ranking = HIGHEST,
    scope: Scope = "global",
) -> Iterator[tuple[str, Tensor]]:
    """Take exactly ⌊density · N⌋ weights, the first in the ranking; ties go to the lowest index in parameter order.

    Args:
        scores: of the N weights that take part.
        density: share of weights, in (0, 1].
        ranking: largest absolute value first, unless said otherwise.
        scope: what competes: all weights (``global``), those of a tensor, or those of a ``row`` (a vector along the
            last dimension). Of the weights up to the end of each tensor or row, in parameter order, exactly
            ⌊density · their number⌋ are taken: each gets its share to within one weight, and the total is exact.

    Yields:
        (parameter name, packed bits), see :func:`wagle_pl.masks.bits.pack_bits`.

    Raises:
        WagleError: if density is outside (0, 1] or takes no weight, or a score is NaN or infinite.
    """
    for name, (bits,) in select_each(scores, [density], ranking, scope):
        yield name, bits


def select_each(
    scores: Scores,
    densities: Sequence[float],
    ranking: Ranking = HIGHEST,
    scope: Scope = "global",
    shards: Optional[Mapping[str, Shard]] = None,
) -> Iterator[tuple[str, list[Tensor]]]:
    """:func:`select` for several densities, in the passes of one; yields the packed bits of each.

    Args:
        scores, densities, ranking, scope: see :func:`select`.
        shards: with several ranks, which rows of each parameter this one scores; then the bits are of those rows, and
            all ranks must iterate together.
    """
    for density in densities:
        check_density(density)
    if scope == "global":
        selected = _select_global(scores, densities, ranking)
    else:
        parts = _tensor_parts if scope == "tensor" else _row_parts
        selected = _select_within(scores, densities, ranking, parts, shards or {})
    any_weight = [False] * len(densities)
    for name, bits in selected:
        any_weight = [found or bool(b.any()) for found, b in zip(any_weight, bits, strict=True)]
        yield name, bits
    for density, found in zip(densities, any_weight, strict=True):
        if not distributed.all_reduce_max(int(found)):
            raise WagleError(
                f"density {float(density):g} of the weights that take part selects none; raise it"
            )


# -- one threshold for all ------------------------------------------------------------------------------------------


def find_thresholds(
    scores: Scores,
    counts: Callable[[int], Sequence[int]],
    ranking: Ranking = HIGHEST,
    reduce: Reduce = distributed.all_reduce_sum,
) -> list[Threshold]:
    """The key that parts the first k in the ranking from the rest, for several k, in two passes.

    Args:
        scores: of the weights that compete.
        counts: number of weights -> the numbers k to take, each from 0 to that number.
        ranking: their order.
        reduce: adds up int64 counts over shards.

    Raises:
        WagleError: if a score is NaN or infinite, naming the parameter.
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)
    not_finite: list[str] = []
    for name, tensor in scores():
        for chunk in _chunks(tensor):
            bins = (order_keys(chunk, ranking) >> 16).add_(_OFFSET)
            upper += torch.bincount(bins, minlength=_HALF).cpu()
        if not not_finite and (
            upper[_OFFSET + _INFINITE :].any() or upper[: _OFFSET - _INFINITE].any()
        ):
            not_finite.append(name)
    if distributed.all_reduce_max(len(not_finite)):
        raise _not_finite(distributed.all_gather(not_finite)[0])
    upper = reduce(upper)
    ks = counts(int(upper.sum()))
    places = [_descend(upper, k) for k in ks]
    lower = {bin_: torch.zeros(_HALF, dtype=torch.int64) for bin_, _ in places if bin_ is not None}
    for _, tensor in scores():
        for chunk in _chunks(tensor):
            keys = order_keys(chunk, ranking)
            upper_bits = keys >> 16
            for bin_, count in lower.items():
                low_bits = _at(keys, upper_bits == bin_ - _OFFSET) & (_HALF - 1)
                count += torch.bincount(low_bits, minlength=_HALF).cpu()
    lower = {bin_: reduce(count) for bin_, count in lower.items()}
    thresholds = []
    for k, (bin_, above) in zip(ks, places, strict=True):
        if bin_ is None:
            thresholds.append(Threshold(_NONE, 0))
            continue
        low, above_low = _descend(lower[bin_], k - above)
        key, ties = ((bin_ - _OFFSET) << 16) | low, k - above - above_low
        whole = ties == int(lower[bin_][low])  # all of this key are taken: no need to count ties
        thresholds.append(Threshold(key - 1, 0) if whole else Threshold(key, ties))
    return thresholds


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).float().split(CHUNK)


def _at(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]``, by way of NumPy on the CPU, where that is three times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def _descend(counts: Tensor, k: int) -> tuple[Union[int, None], int]:
    """The bin in which the k-th from the top lies (None if k is 0), and how many lie in higher bins."""
    if k == 0:
        return None, 0
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above


def _not_finite(name: str) -> WagleError:
    return WagleError(
        f"scores of {name} are not finite: its gradients overflowed or its Hessian is zero"
    )


def _select_global(
    scores: Scores, densities: Sequence[float], ranking: Ranking
) -> Iterator[tuple[str, list[Tensor]]]:
    wanted: list[int] = []

    def counts(total: int) -> list[int]:
        wanted[:] = [exact_count(density, total) for density in densities]
        return wanted

    takers = [_Taker(threshold) for threshold in find_thresholds(scores, counts, ranking)]
    taken = torch.zeros(len(takers), dtype=torch.int64)
    for name, tensor in scores():
        bits = _take(tensor, takers, ranking)
        taken += torch.tensor([count_bits(packed) for packed in bits])
        yield name, bits
    if distributed.all_reduce_sum(taken).tolist() != wanted:
        raise WagleError(
            "a weight's score differs from pass to pass: a Score is called several times for each "
            "parameter and must give the same each time"
        )


def _take(tensor: Tensor, takers: Sequence[_Taker], ranking: Ranking) -> list[Tensor]:
    """The packed bits of what each taker takes of this rank's rows of a parameter."""
    shared = distributed.is_distributed() and any(taker.ties for taker in takers)
    left = _share_ties(tensor, takers, ranking) if shared else []
    bits = [
        _packed(tensor.numel(), (taker(order_keys(chunk, ranking)) for chunk in _chunks(tensor)))
        for taker in takers
    ]
    for taker, ties in zip(takers, left, strict=shared):
        taker.ties = ties
    return bits


def _share_ties(tensor: Tensor, takers: Sequence[_Taker], ranking: Ranking) -> list[int]:
    """Leave this rank the ties that earlier rows do not take; returns how many are left after all ranks' rows."""
    here = [
        sum(int((order_keys(chunk, ranking) == taker.key).sum()) for chunk in _chunks(tensor))
        if taker.ties
        else 0
        for taker in takers
    ]
    counts = torch.tensor(distributed.all_gather([here]))  # (ranks, takers)
    wanted = torch.tensor([taker.ties for taker in takers])
    allowed = (wanted - counts[: distributed.rank()].sum(0)).clamp(min=0)
    for taker, ties in zip(takers, allowed.tolist(), strict=True):
        taker.ties = ties
    return (wanted - counts.sum(0)).clamp(min=0).tolist()


class _Taker:
    """Says which keys are taken, chunk after chunk in parameter order; counts down the ties."""

    def __init__(self, threshold: Threshold) -> None:
        self.key, self.ties = threshold

    def __call__(self, keys: Tensor) -> Tensor:
        taken = keys > self.key
        if self.ties:
            equal = (keys == self.key).nonzero().view(-1)[: self.ties]
            taken[equal] = True
            self.ties -= len(equal)
        return taken


def _packed(weights: int, parts: Iterable[Tensor]) -> Tensor:
    """The packed bits of bool tensors that follow each other; all but the last hold whole bytes."""
    packed = torch.empty((weights + 7) // 8, dtype=torch.uint8)
    start = 0
    for part in parts:
        bits = pack_bits(part)
        packed[start : start + len(bits)] = bits
        start += len(bits)
    return packed


# -- a quota for every tensor or row ----------------------------------------------------------------------------------

#: (name, scores, shard, weights before the parameter in parameter order, densities, ranking) -> packed bits for each
#: density.
_Parts = Callable[[str, Tensor, Shard, int, Sequence[float], Ranking], list[Tensor]]


def _select_within(
    scores: Scores,
    densities: Sequence[float],
    ranking: Ranking,
    parts: _Parts,
    shards: Mapping[str, Shard],
) -> Iterator[tuple[str, list[Tensor]]]:
    """One pass: a parameter holds all that competes within it."""
    start = 0
    for name, tensor in scores():
        shard = shards[name] if name in shards else Shard(tensor.shape, 0, 1)
        yield name, parts(name, tensor, shard, start, densities, ranking)
        start += shard.total


def _tensor_parts(
    name: str,
    tensor: Tensor,
    shard: Shard,
    start: int,
    densities: Sequence[float],
    ranking: Ranking,
) -> list[Tensor]:
    quotas = [_quotas(density, start, shard.total, 1)[0] for density in densities]
    thresholds = find_thresholds(lambda: [(name, tensor)], lambda _: quotas, ranking)
    return _take(tensor, [_Taker(threshold) for threshold in thresholds], ranking)


def _row_parts(
    name: str,
    tensor: Tensor,
    shard: Shard,
    start: int,
    densities: Sequence[float],
    ranking: Ranking,
) -> list[Tensor]:
    if len(shard.shape) < 2:
        return _tensor_parts(name, tensor, shard, start, densities, ranking)
    if distributed.all_reduce_max(int(not torch.isfinite(tensor).all())):
        raise _not_finite(name)
    width = shard.shape[-1]
    rows = tensor.numel() // max(1, width)
    if not rows:
        return [torch.zeros(0, dtype=torch.uint8) for _ in densities]
    matrix = tensor.reshape(rows, width)
    block = max(8, CHUNK // width // 8 * 8)  # whole bytes, wherever a row ends
    bits = []
    for density in densities:
        quotas = torch.from_numpy(_quotas(density, start + shard.first, width, rows))

        def taken(quotas: Tensor = quotas) -> Iterator[Tensor]:
            for first in range(0, rows, block):
                part = matrix[first : first + block].float()
                yield take_in_rows(order_keys(part, ranking), quotas[first : first + block])

        bits.append(_packed(tensor.numel(), taken()))
    return bits


def _quotas(density: float, start: int, width: int, rows: int) -> np.ndarray:
    """How many weights each of several rows in sequence gets: the floors of the running total, differenced."""
    share = Fraction(str(density))
    ends = [exact_count(share, start + width * row) for row in range(rows + 1)]
    return np.diff(np.array(ends, dtype=np.int64)).clip(max=width)


def take_in_rows(keys: Tensor, quotas: Tensor) -> Tensor:
    """The largest keys of every row.

    Args:
        keys: (R, C) int32.
        quotas: (R,) int64, how many to take, 0 to C; ties go to the lowest column.

    Returns:
        (R, C) bool.
    """
    taken = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    quotas = quotas.to(keys.device)
    for quota in quotas.unique().tolist():
        if not quota:
            continue
        rows = (quotas == quota).nonzero().view(-1)
        part = keys[rows]
        threshold = part.kthvalue(part.shape[1] - quota + 1, dim=1, keepdim=True).values
        above, equal = part > threshold, part == threshold
        ties = quota - above.sum(1, keepdim=True)
        taken[rows] = above | (equal & (equal.cumsum(1) <= ties))
    return taken
