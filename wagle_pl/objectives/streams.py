"""What an objective sees of a batch: the :class:`Answers` of each of its :class:`Streams`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.lm.layers import capture
from wagle_pl.lm.likelihood import IGNORE, token_logprobs
from wagle_pl.objectives.top_k import Buckets, TopK


class Answers:
    """What a model says about the answers of one stream's batch, computed when asked for.

    Below, B is the number of rows, T their length in tokens, V the vocabulary, and N the number of
    answer tokens of the whole batch, row after row.

    Attributes:
        logits: (B, T, V).
        labels: (B, T), -100 where nothing is to be predicted.
        reference: (B,) summed log-probability at θ₀; None unless the objective lists the stream in
            ``references``.
        rows: (B,) index of each row in its set; None where it is not known.
        hidden: block -> (B, T, d), its output; the blocks that the objective names in
            ``hidden_layers``.
        attention: (B, T), 0 where a row is padded; of a stream that the objective names in
            ``whole_streams``.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        reference: Optional[Tensor] = None,
        rows: Optional[Tensor] = None,
        hidden: Optional[Mapping[int, Tensor]] = None,
        theta0: Optional[Callable[[], Answers]] = None,
        top_k: Optional[TopK] = None,
        attention: Optional[Tensor] = None,
    ) -> None:
        self.logits = logits
        self.labels = labels
        self.reference = reference
        self.rows = rows
        self.hidden = hidden or {}
        self.attention = attention
        self._theta0 = theta0
        self._top_k = top_k

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.logits, self.labels)

    @property
    def token_logprobs(self) -> Tensor:
        """(B, T − 1) log-probability of each answer token in fp32, 0 elsewhere."""
        return self._tokens[0]

    @property
    def mask(self) -> Tensor:
        """(B, T − 1) bool: where an answer token is predicted."""
        return self._tokens[1]

    @cached_property
    def length(self) -> Tensor:
        """(B,) number of answer tokens."""
        return self.mask.sum(-1)

    @cached_property
    def logprob(self) -> Tensor:
        """(B,) summed log-probability of the answer, log π(y|x)."""
        return self.token_logprobs.sum(-1)

    @cached_property
    def nll(self) -> Tensor:
        """(B,) mean negative log-likelihood per answer token."""
        return -self.logprob / self.length

    @cached_property
    def predictions(self) -> Tensor:
        """(N, V) logits that predict the answer tokens, in fp32."""
        return self.logits[:, :-1][self.mask].float()

    @property
    def targets(self) -> Tensor:
        """(N,) the answer tokens."""
        return self.labels[:, 1:][self.mask]

    def mean_tokens(self, values: Tensor) -> Tensor:
        """(N,) numbers, one an answer token -> (B,) their mean over each row."""
        grid = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return grid.masked_scatter(self.mask, values).sum(-1) / self.length

    # -- beside θ₀ ---------------------------------------------------------------------------------

    @cached_property
    def theta0(self) -> Answers:
        """The same answers at θ₀, from the frozen copy, without gradients."""
        if self._theta0 is None:
            raise TypeError(
                "there is no copy of θ₀ here: name the stream in the objective's logits_at_theta0"
            )
        return self._theta0()

    @cached_property
    def buckets(self) -> Buckets:
        """Predictions of each answer token at θ₀ and now, over the vocabulary or the top k."""
        if self._top_k is not None:
            return self._top_k.align(self.predictions)
        reference = self.theta0.predictions.log_softmax(-1)
        return Buckets(reference, self.predictions.log_softmax(-1), self.targets)

    def hidden_difference(self, layer: int, target: Tensor) -> Tensor:
        """Squared distance of a block's output from a target, a dimension and answer token.

        Args:
            layer: the block, counted from 0.
            target: what broadcasts to (B, T, d).

        Returns:
            (B,) (1/|y|) Σ_t (1/d) ‖h_t − target_t‖², t over the answer tokens.
        """
        distance = (self.hidden[layer].float() - target.float()).square().mean(-1)
        mask = self.labels != IGNORE
        return distance.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


class Streams(Mapping[str, Answers]):
    """Streams of one batch; the model runs on a stream when an objective first asks for it.

    Args:
        batch: stream -> tensors, as the data module makes them.
        run: tensors of one stream -> (logits, labels), from the first answer token on; with the
            keyword ``whole`` of all positions.
        references: stream -> (rows of the set,) summed log-probabilities at θ₀.
        lm: the model that ``run`` runs; needed for ``layers`` and for objectives that read weights.
        layers: blocks whose output is kept.
        theta0: tensors of one stream (``whole`` for all positions) -> (logits, labels, outputs of
            ``layers``) at θ₀.
        top_k: stream -> cached predictions at θ₀, in place of the copy's.
        progress: share of the run's steps that is done, 0 at the first and 1 at the last.
        epoch: counted from 0.
        whole: streams of which a term needs logits of every position.
    """

    def __init__(
        self,
        batch: Mapping[str, Mapping[str, Tensor]],
        run: Callable[..., tuple[Tensor, Tensor]],
        references: Mapping[str, Tensor],
        lm: Any = None,
        layers: Collection[int] = (),
        theta0: Optional[Callable[..., tuple[Tensor, Tensor, dict[int, Tensor]]]] = None,
        top_k: Optional[Mapping[str, TopK]] = None,
        progress: float = 0.0,
        epoch: int = 0,
        whole: Collection[str] = (),
    ) -> None:
        self.batch = batch
        self.lm = lm
        self.progress = progress
        self.epoch = epoch
        self._run = run
        self._references = references
        self._layers = tuple(layers)
        self._theta0 = theta0
        self._top_k = top_k or {}
        self._whole = frozenset(whole)
        self._answers: dict[str, Answers] = {}

    def __getitem__(self, stream: str) -> Answers:
        if stream not in self._answers:
            tensors = self.batch[stream]
            options = {"whole": True} if stream in self._whole else {}
            with capture(self.lm, self._layers) as hidden:
                logits, labels = self._run(tensors, **options)
            reference, top_k = self._references.get(stream), self._top_k.get(stream)
            if reference is not None:
                reference = reference.to(logits.device)[tensors["row"]]
            self._answers[stream] = Answers(
                logits,
                labels,
                reference=reference,
                rows=tensors.get("row"),
                hidden=_answer_positions(hidden, labels),
                theta0=self._theta0 and partial(_at_theta0, self._theta0, tensors, options),
                top_k=None if top_k is None else top_k.rows(tensors["row"]).to(logits.device),
                attention=tensors.get("attention_mask") if options else None,
            )
        return self._answers[stream]

    def __iter__(self):
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)

    def mean(self, stream: str, values: Tensor, what: str = "values") -> Tensor:
        """Weighted sum of (B,) values.

        Once ranks and micro-batches are averaged it is the mean over the global batch.

        Args:
            stream: whose rows the values are of.
            values: (B,).
            what: how to name them in a message.

        Raises:
            WagleError: if they have another shape.
        """
        weight = self.batch[stream]["weight"]
        wanted = f"one number for each of {len(weight)} rows, shape {tuple(weight.shape)}"
        if not isinstance(values, Tensor):
            raise WagleError(f"{what}: must be a tensor, {wanted}, got {type(values).__name__}")
        if values.shape != weight.shape:
            raise WagleError(f"{what}: must be {wanted}, got shape {tuple(values.shape)}")
        weight = weight.to(values.dtype)
        return (weight * values.masked_fill(weight == 0, 0.0)).sum()


def _at_theta0(
    run: Callable[..., tuple[Tensor, Tensor, dict[int, Tensor]]],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, bool],
) -> Answers:
    # no method of Streams: answers would keep alive what keeps them, with the graph of the batch
    logits, labels, hidden = run(tensors, **options)
    return Answers(logits, labels, hidden=_answer_positions(hidden, labels))


def _answer_positions(hidden: Mapping[int, Tensor], labels: Tensor) -> dict[int, Tensor]:
    """Outputs of blocks, cut to the positions that labels cover: the prompt's have no logits."""
    return {
        layer: states[:, states.shape[1] - labels.shape[1] :] for layer, states in hidden.items()
    }
