"""Exact selection of the top share of N weights, without sorting, gathering or copying them all.

The bits of a float, read as an integer, have the order of the floats. Two counting passes, over the
upper and then the lower sixteen bits, find the exact k-th value; a last pass writes the mask.
Counts of several ranks are added, and several densities share the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor

from wagle_pl.attribution.sums import BLOCK, Shard
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, check_density
from wagle_pl.masks.bits import count_bits, pack_bits

CHUNK = 1 << 18  # weights processed at a time on a CPU, a multiple of 8: the only extra memory

_HALF = 1 << 16
_OFFSET = _HALF // 2  # the upper half of a key is signed; bins count from 0
_INFINITE = 0x7F80  # upper sixteen bits of the first float that is not finite

Scope = Literal["global", "tensor", "row"]

#: (parameter name, its float32 scores in its shape) for every eligible parameter, in parameter
#: order. Called once per pass, with the same result each time. Each rank yields its own rows.
Scores = Callable[[], Iterable[tuple[str, Tensor]]]


class Ranking(NamedTuple):
    """Order of scores: by absolute value or by value, highest or lowest first."""

    absolute: bool = True
    low: bool = False


HIGHEST = Ranking()


def exact_count(density: Union[float, Fraction], total: int) -> int:
    """⌊density · total⌋ with the density as written in decimal; in binary, 0.29 · 100 gives 28.

    >>> exact_count(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    share = density if isinstance(density, Fraction) else Fraction(str(density))
    return share.numerator * total // share.denominator


def order_keys(scores: Tensor, ranking: Ranking = HIGHEST) -> Tensor:
    """int32 keys of float32 scores: the largest is selected first, and equal scores have equal
    keys.

    >>> scores = torch.tensor([-2.0, 1.0])
    >>> order_keys(scores).argmax(), order_keys(scores, Ranking(absolute=False)).argmax()
    (tensor(0), tensor(1))
    """
    if ranking.absolute:
        keys = scores.abs().view(torch.int32)
    else:
        bits = (scores + 0.0).view(torch.int32)  # −0 becomes 0: the two are equal scores
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ~keys if ranking.low else keys


def select_each(
    scores: Scores,
    densities: Sequence[float],
    ranking: Ranking = HIGHEST,
    scope: Scope = "global",
    shards: Optional[Mapping[str, Shard]] = None,
) -> Iterator[tuple[str, list[Tensor]]]:
    """Select exactly ⌊density · N⌋ weights, the first in the ranking, for each of the densities;
    ties go to the lowest index in parameter order.

    Args:
        scores: of the N eligible weights.
        densities: shares of weights, in (0, 1].
        ranking: largest absolute value first by default.
        scope: rank all weights together (``global``), within each ``tensor``, or within each
            ``row`` (a vector along the last dimension). Up to the end of each tensor or row, in
            parameter order, exactly ⌊density · number of weights so far⌋ are selected: each gets
            its share to within one weight, and the total is exact.
        shards: with several ranks, the rows of each parameter that this rank scores. Iteration is
            then collective, and yields the bits of those rows.

    Yields:
        (parameter name, packed bits for each density), see :func:`wagle_pl.masks.bits.pack_bits`.

    Raises:
        WagleError: if a density is outside (0, 1] or selects no weight, or a score is NaN or
            infinite.
    """
    for density in densities:
        check_density(density)
    if scope == "global":
        return _select_global(scores, densities, ranking)
    return _select_within(scores, densities, ranking, scope == "row", shards or {})


def _wanted(densities: Sequence[float], total: int) -> list[int]:
    """Number of weights that each density selects."""
    wanted = [exact_count(density, total) for density in densities]
    for density, count in zip(densities, wanted, strict=True):
        if not count:
            raise WagleError(
                f"density {float(density):g} of the eligible weights selects none", hint="raise it"
            )
    return wanted


# -- one threshold for all weights -----------------------------------------------------------------


@dataclass
class Threshold:
    """Selects keys above ``key``, and the first ``ties`` of those equal to it."""

    key: int
    ties: int

    def take(self, keys: Tensor) -> Tensor:
        """Which keys are selected, chunk after chunk in parameter order; counts down the ties."""
        taken = keys > self.key
        if self.ties:
            equal = (keys == self.key).nonzero().view(-1)[: self.ties]
            taken[equal] = True
            self.ties -= len(equal)
        return taken


def find_thresholds(
    scores: Scores, counts: Callable[[int], Sequence[int]], ranking: Ranking = HIGHEST
) -> list[Threshold]:
    """Thresholds that select the first k in the ranking, for several k: ``counts`` maps the number
    of weights to these k, each from 0 to that number. Collective.

    Raises:
        WagleError: if a score is NaN or infinite, naming the parameter.
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)
    not_finite: list[str] = []
    for name, tensor in scores():
        for keys in _keys(tensor, ranking):
            upper += torch.bincount((keys >> 16).add_(_OFFSET), minlength=_HALF).cpu()
        if upper[_OFFSET + _INFINITE :].any() or upper[: _OFFSET - _INFINITE].any():
            not_finite = not_finite or [name]
        del tensor  # before the next is computed
    check_finite(not_finite)
    upper = distributed.all_reduce_sum(upper)
    ks = counts(int(upper.sum()))
    places = [_descend(upper, k) for k in ks]
    lower = {bin_: torch.zeros(_HALF, dtype=torch.int64) for bin_, _ in places}
    for _, tensor in scores():
        for keys in _keys(tensor, ranking):
            upper_bits = keys >> 16
            for bin_, count in lower.items():
                inside = _at(keys, upper_bits == bin_ - _OFFSET) & (_HALF - 1)
                count += torch.bincount(inside, minlength=_HALF).cpu()
        del tensor
    lower = {bin_: distributed.all_reduce_sum(count) for bin_, count in lower.items()}
    thresholds = []
    for k, (bin_, above) in zip(ks, places, strict=True):
        low, above_low = _descend(lower[bin_], k - above)
        key, ties = ((bin_ - _OFFSET) << 16) | low, k - above - above_low
        takes_all = ties == int(lower[bin_][low])  # of this key: no need to count ties
        thresholds.append(Threshold(key - 1, 0) if takes_all else Threshold(key, ties))
    return thresholds


def _keys(tensor: Tensor, ranking: Ranking) -> Iterator[Tensor]:
    """Keys of a parameter's scores, a chunk at a time."""
    for chunk in tensor.reshape(-1).float().split(_chunk(tensor)):
        yield order_keys(chunk, ranking)


def _chunk(tensor: Tensor) -> int:
    """How many weights to process at a time; on a GPU few large operations are faster."""
    return CHUNK if tensor.device.type == "cpu" else BLOCK


def _at(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]``, by way of NumPy on the CPU, where that is three times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th from the top lies, and how many lie in higher bins."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above


def check_finite(not_finite: Sequence[str]) -> None:
    """Raise :class:`WagleError` if any rank names a parameter. Collective."""
    if names := distributed.all_gather(not_finite):
        raise WagleError(
            f"scores of {names[0]} are not finite: its gradients overflowed or its Hessian is zero"
        )


def _select_global(
    scores: Scores, densities: Sequence[float], ranking: Ranking
) -> Iterator[tuple[str, list[Tensor]]]:
    wanted: list[int] = []

    def counts(total: int) -> list[int]:
        wanted.extend(_wanted(densities, total))
        return wanted

    thresholds = find_thresholds(scores, counts, ranking)
    taken = torch.zeros(len(densities), dtype=torch.int64)
    for name, tensor in scores():
        bits = _take(tensor, thresholds, ranking)
        del tensor
        taken += torch.tensor([count_bits(packed) for packed in bits])
        yield name, bits
    if distributed.all_reduce_sum(taken).tolist() != wanted:
        raise WagleError(
            "a weight's score differs from pass to pass",
            hint="a Score must return the same at each call",
        )


def _take(tensor: Tensor, thresholds: Sequence[Threshold], ranking: Ranking) -> list[Tensor]:
    """The packed bits that each threshold selects among this rank's rows of a parameter."""
    wanted = torch.tensor([threshold.ties for threshold in thresholds])
    several = distributed.is_distributed() and bool(wanted.any())
    if several:  # ties of lower ranks' rows come first
        here = [
            sum(int((keys == t.key).sum()) for keys in _keys(tensor, ranking)) if t.ties else 0
            for t in thresholds
        ]
        counts = torch.tensor(distributed.all_gather([here]))  # (ranks, thresholds)
        _set_ties(thresholds, wanted - counts[: distributed.rank()].sum(0))
    bits = [
        packed_parts(tensor.numel(), (threshold.take(keys) for keys in _keys(tensor, ranking)))
        for threshold in thresholds
    ]
    if several:
        _set_ties(thresholds, wanted - counts.sum(0))
    return bits


def _set_ties(thresholds: Sequence[Threshold], ties: Tensor) -> None:
    for threshold, count in zip(thresholds, ties.clamp(min=0).tolist(), strict=True):
        threshold.ties = count


def packed_parts(weights: int, parts: Iterable[Tensor]) -> Tensor:
    """The packed bits of consecutive bool tensors; all but the last fill whole bytes."""
    packed = torch.empty((weights + 7) // 8, dtype=torch.uint8)
    start = 0
    for part in parts:
        bits = pack_bits(part)
        packed[start : start + len(bits)] = bits
        start += len(bits)
    return packed


# -- a quota for every tensor or row ---------------------------------------------------------------


def _select_within(
    scores: Scores,
    densities: Sequence[float],
    ranking: Ranking,
    by_row: bool,
    shards: Mapping[str, Shard],
) -> Iterator[tuple[str, list[Tensor]]]:
    """One pass over the parameters is enough, since weights only compete within each of them."""
    start = 0
    for name, tensor in scores():
        shard = shards[name] if name in shards else Shard(tensor.shape, 0, 1)
        if by_row and len(shard.shape) > 1:
            check_finite([] if torch.isfinite(tensor).all() else [name])
            width = shard.shape[-1]
            rows = tensor.reshape(-1, width) if tensor.numel() else tensor.new_zeros(0, width)
            quotas = [_quotas(d, start + shard.first, width, len(rows)) for d in densities]
            yield name, [_select_rows(rows, quota, ranking) for quota in quotas]
        else:
            ks = [int(_quotas(d, start, shard.total, 1)) for d in densities]
            only = [(name, tensor)]
            thresholds = find_thresholds(only.copy, lambda _: ks, ranking)  # noqa: B023 -- called at once
            yield name, _take(tensor, thresholds, ranking)
        start += shard.total
    _wanted(densities, start)


def _quotas(density: float, start: int, width: int, rows: int) -> Tensor:
    """(rows,) quotas of consecutive rows: differences of the floors of the running total."""
    share = Fraction(str(density))
    ends = [exact_count(share, start + width * row) for row in range(rows + 1)]
    return torch.from_numpy(np.diff(np.array(ends, dtype=np.int64)))


def _select_rows(rows: Tensor, quotas: Tensor, ranking: Ranking) -> Tensor:
    """Packed bits that select the first ``quotas``, (R,), weights in the ranking of each row of
    ``rows``, (R, C); ties go to the lowest column."""
    # blocks fill whole bytes, wherever a row ends
    block = max(8, _chunk(rows) // max(1, rows.shape[1]) // 8 * 8)
    parts = zip(rows.split(block), quotas.split(block), strict=True)
    taken = (_take_in_rows(order_keys(part.float(), ranking), of_part) for part, of_part in parts)
    return packed_parts(rows.numel(), taken)


def _take_in_rows(keys: Tensor, quotas: Tensor) -> Tensor:
    """(R, C) bool: the ``quotas``, (R,), largest keys, (R, C), of every row."""
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
