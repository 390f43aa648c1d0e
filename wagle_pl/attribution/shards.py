"""Which rows of a parameter a rank keeps sums and scores of.

Rows, so that a score that looks along a row (an activation norm for each column, a quota for each row) needs no other
rank's; and as many of them that the bits of a rank's weights fill whole bytes, so that masks are joined byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

from wagle_pl.core import distributed


class Shard:
    """This rank's rows of a parameter: all of them on one device.

    Args:
        shape: of the parameter. A vector's rows are its numbers.
        rank: this rank; from the process group when None.
        ranks: how many there are.

    Attributes:
        shape: of the parameter.
        start, stop: the rows.
        first: the first weight's place in the flattened parameter.

    >>> shard = Shard((5, 2), rank=1, ranks=2)
    >>> shard.start, shard.stop, shard.first
    (4, 5, 8)
    """

    def __init__(
        self, shape: Sequence[int], rank: int | None = None, ranks: int | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.ranks = distributed.world_size() if ranks is None else ranks
        rank = distributed.rank() if rank is None else rank
        self._rows, *rest = self.shape or (1,)
        self._rest = tuple(rest)
        width = prod(rest)
        in_bytes = 8 // gcd(8, width) if width else 1
        self._each = (
            self._rows if self.ranks == 1 else -(-self._rows // (self.ranks * in_bytes)) * in_bytes
        )
        self.start, self.stop = (min(r * self._each, self._rows) for r in (rank, rank + 1))
        self.first = self.start * width

    @property
    def total(self) -> int:
        """Weights of the whole parameter."""
        return prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor of the parameter's shape: a view."""
        return (
            whole
            if self.ranks == 1
            else whole.reshape(self._rows, *self._rest)[self.start : self.stop]
        )

    def zeros(self, device: torch.device) -> Tensor:
        """fp32 zeros for this rank's rows."""
        shape = self.shape if self.ranks == 1 else (self.stop - self.start, *self._rest)
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum of the ranks' tensors of the parameter's shape; a meeting of all ranks."""
        if self.ranks == 1:
            return whole
        padded = _padded(whole.reshape(self._rows, *self._rest), self._each * self.ranks)
        return distributed.reduce_scatter(padded)[: self.stop - self.start]

    def gather(self, rows: Tensor) -> Tensor:
        """The parameter-shaped tensor of which each rank has its rows; a meeting of all ranks."""
        if self.ranks == 1:
            return rows
        return distributed.all_gather_tensor(_padded(rows, self._each))[: self._rows].reshape(
            self.shape
        )

    def gather_bits(self, packed: Tensor) -> Tensor:
        """The packed bits of the parameter of which each rank has those of its rows; a meeting of all ranks."""
        if self.ranks == 1:
            return packed
        share = self._each * prod(self._rest) // 8
        whole = distributed.all_gather_tensor(_padded(packed.to(distributed.device()), share))
        return whole[: (self.total + 7) // 8].cpu()


def _padded(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])
