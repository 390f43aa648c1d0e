"""Predictions at θ₀ in 8·k + 4 bytes a token: the k most probable tokens and the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Buckets(NamedTuple):
    """Predictions of N answer tokens at θ₀ and now, over the same K buckets.

    A bucket is a single token; the last may be all others together.

    Attributes:
        reference: (N, K) log-probabilities at θ₀.
        current: (N, K) log-probabilities now.
        label: (N,) the bucket of the true token.
    """

    reference: Tensor
    current: Tensor
    label: Tensor


class TopK(NamedTuple):
    """The k most probable tokens of many rows' answer tokens at θ₀, and the rest as one bucket.

    The true token is always among the k, first. A divergence KL(π₀ ‖ π) over the k + 1 buckets is a
    lower bound of the true one; what it misses is t₀ · KL of the two predictions *within* the rest,
    where t₀ is the probability of the rest at θ₀. (Chain rule of the divergence.)

    Attributes:
        ids: (N, k) int32 tokens; N the number of answer tokens, row after row.
        logprobs: (N, k) fp32, their log-probabilities.
        tail: (N,) fp32, log-probability of all other tokens together.
        offsets: (rows + 1,) int64, where each row begins.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, counts: Tensor, k: int) -> TopK:
        """The top k of (N, V) logits.

        Args:
            logits: (N, V).
            targets: (N,) the true tokens.
            counts: (rows,) how many tokens each row has.
            k: how many to keep; V − 1 at most are.
        """
        logprobs = logits.float().log_softmax(-1)
        k = min(k, logits.shape[-1] - 1)
        ids = logprobs.scatter(1, targets[:, None], 1.0).topk(k, -1).indices  # the true token first
        return cls(ids.int(), logprobs.gather(1, ids), _outside(logprobs, ids), _offsets(counts))

    @classmethod
    def cat(cls, parts: list[TopK]) -> TopK:
        """Rows of several, in this order."""
        ids, logprobs, tail, _ = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(
            ids, logprobs, tail, _offsets(torch.cat([part.offsets.diff() for part in parts]))
        )

    def rows(self, index: Tensor) -> TopK:
        """The predictions of some rows, in this order."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in index.tolist()]
        counts = self.offsets.diff()[index.to(self.offsets.device)]
        parts = (torch.cat([tensor[span] for span in spans]) for tensor in self[:3])
        return TopK(*parts, _offsets(counts))

    def to(self, device: torch.device) -> TopK:
        """The same on a device."""
        return TopK(*(tensor.to(device) for tensor in self))

    def align(self, logits: Tensor) -> Buckets:
        """These predictions beside those of (N, V) logits."""
        logprobs, ids = logits.log_softmax(-1), self.ids.long()
        reference = torch.cat([self.logprobs, self.tail[:, None]], -1)
        current = torch.cat([logprobs.gather(1, ids), _outside(logprobs, ids)[:, None]], -1)
        return Buckets(reference, current, ids.new_zeros(len(ids)))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _outside(logprobs: Tensor, ids: Tensor) -> Tensor:
    """(N,) log-probability of all tokens but ``ids``, without cancellation."""
    others = logprobs.scatter(1, ids, -torch.inf)
    none = (others == -torch.inf).all(-1)  # where logsumexp has no gradient
    return others.masked_fill(none[:, None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)
