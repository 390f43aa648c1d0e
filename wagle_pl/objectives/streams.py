"""An objective's view of a batch: the :class:`Answers` of each of its :class:`Streams`.

Objectives that compare with θ₀ get its predictions in one of three ways, the cheapest first:

* *sums* (NPO, DPO): one log-probability per row, computed once before the first step, so that no
  second model is kept;
* *top k* (KL, UNDIAL with ``reference_logits: top_k``): the most probable tokens at each answer
  token, :class:`TopK`, also computed once;
* *a frozen copy* (whole predictions, and hidden states): one more forward pass per step, see
  :meth:`wagle_pl.masks.selected.SelectedWeights.at_theta0`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import evaluating
from wagle_pl.lm.inference import (
    IGNORE,
    Predictions,
    answer_places,
    forward_answers,
    in_chunks,
    logprobs_of,
)
from wagle_pl.lm.layers import capture

if TYPE_CHECKING:
    from wagle_pl.lm.module import LanguageModule

    #: Module and stream -> tensors that are computed at θ₀, by name.
    Compute = Callable[[LanguageModule, str], dict[str, Tensor]]


@dataclass(eq=False)
class Answers:
    """A model's predictions for the answers of one stream's batch, computed on demand.

    B is the number of rows, T their length in tokens, V the vocabulary, and N the number of answer
    tokens of the whole batch, row after row.
    """

    #: At the N positions that predict an answer token; for streams in the objective's
    #: ``whole_streams`` at all (B · T,), and then what is by answer token is not available.
    predicted: Predictions
    labels: Tensor  # (B, T), -100 where nothing is predicted
    places: Tensor  # (N,) positions of these predictions in the flattened (B, T)
    #: (B,) summed log-probability at θ₀; only for streams in the objective's ``references``.
    reference: Optional[Tensor] = None
    rows: Optional[Tensor] = None  # (B,) index of each row in its set, if known
    #: Block -> (B, T, d), its output; only for the objective's ``hidden_layers``.
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    #: Computes the same answers at θ₀, see :attr:`theta0`.
    run_theta0: Optional[Callable[[], Answers]] = None
    #: Stored predictions at θ₀, used instead of :attr:`theta0`, see :meth:`beside_theta0`.
    top_k: Optional[TopK] = None

    @cached_property
    def token_logprobs(self) -> Tensor:
        """(B, T − 1) log-probability of each answer token in fp32, 0 elsewhere."""
        return self._on_grid(in_chunks(logprobs_of, self.predicted, self.targets))

    @cached_property
    def mask(self) -> Tensor:
        """(B, T − 1) bool: where an answer token is predicted."""
        return self.labels[:, 1:] != IGNORE

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

    @property
    def predictions(self) -> Tensor:
        """(N, V) logits that predict the answer tokens, in fp32, all at once; to save memory, use
        :func:`~wagle_pl.lm.inference.in_chunks` on ``predicted``."""
        return self.predicted.logits()

    @cached_property
    def targets(self) -> Tensor:
        """(N,) the answer tokens."""
        return self.labels.flatten().index_select(0, self.places + 1)

    def _on_grid(self, values: Tensor) -> Tensor:
        """(N,) numbers, one per answer token -> (B, T − 1), 0 elsewhere."""
        grid = values.new_zeros(self.labels.numel()).index_copy(0, self.places, values)
        return grid.view(self.labels.shape)[:, :-1]

    def mean_tokens(self, values: Tensor) -> Tensor:
        """(N,) numbers, one per answer token -> (B,) their mean over each row."""
        return self._on_grid(values).sum(-1) / self.length

    @cached_property
    def theta0(self) -> Answers:
        """The same answers at θ₀, from the frozen copy, without gradients."""
        if self.run_theta0 is None:
            raise TypeError(
                "there is no copy of θ₀ here: name the stream in the objective's logits_at_theta0"
            )
        return self.run_theta0()

    def beside_theta0(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(N,) values of ``function``, called on chunks of n tokens: their (n, K) log-probabilities
        at θ₀, (n, K) now, and the (n,) index of the answer token among the K.

        K is the vocabulary, or with top k the stored tokens and one entry for all others.
        """
        if self.top_k is not None:
            return in_chunks(
                lambda now, *kept: function(*TopK(*kept).align(now)), self.predicted, *self.top_k
            )
        return in_chunks(
            lambda now, then, y: function(then.log_softmax(-1), now.log_softmax(-1), y),
            self.predicted,
            self.theta0.predicted,
            self.targets,
        )

    def hidden_difference(self, layer: int, target: Tensor) -> Tensor:
        """(B,) (1/|y|) Σ_t (1/d) ‖h_t − target_t‖², t over the answer tokens.

        Args:
            target: a tensor that broadcasts to (B, T, d).
        """
        distance = (self.hidden[layer].float() - target.float()).square().mean(-1)
        mask = self.labels != IGNORE
        return distance.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


@dataclass(eq=False)
class Streams(Mapping[str, Answers]):
    """Streams of one batch; the model runs on a stream when an objective first asks for it."""

    #: Stream -> tensors, as the data module makes them.
    batch: Mapping[str, Mapping[str, Tensor]]
    #: Tensors of one stream -> predictions at their ``places``.
    run: Callable[[Mapping[str, Any]], Predictions]
    #: Stream -> (rows of the set,) summed log-probabilities at θ₀.
    references: Mapping[str, Tensor]
    #: The model that ``run`` runs; needed for ``layers`` and by objectives that read weights.
    lm: Optional[PreTrainedModel] = None
    layers: Collection[int] = ()  # blocks whose output is kept
    #: Gives a context in which ``run`` runs the model at θ₀.
    theta0: Optional[Callable[[], AbstractContextManager[Any]]] = None
    #: Stream -> stored predictions at θ₀ of each row, used instead of the copy's.
    top_k: Mapping[str, list[TopK]] = field(default_factory=dict)
    progress: float = 0.0  # share of the run's steps that is done, 0 at the first, 1 at the last
    epoch: int = 0  # counted from 0
    logits_of: Collection[str] = ()  # streams for which a term needs logits at every position
    #: Term of the objective -> computes its gradient at once, and returns what stands for the term
    #: in the loss; other terms are propagated with the loss.
    propagate: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    _answers: dict[str, Answers] = field(default_factory=dict, init=False)

    def __getitem__(self, stream: str) -> Answers:
        if stream in self._answers:
            return self._answers[stream]
        tensors = dict(self.batch[stream])
        labels = tensors["labels"]
        if stream in self.logits_of:
            tensors["places"] = torch.arange(labels.numel(), device=labels.device)
            tensors.pop("packed_ids", None)
        elif "places" not in tensors:
            tensors["places"] = answer_places(labels)
        run, lm, layers = self.run, self.lm, self.layers  # a cycle with self would keep the graph

        def ask(context: Callable[[], AbstractContextManager[Any]]) -> Answers:
            with context(), capture(lm, layers) as hidden:
                predicted = replace(run(tensors), context=context)
            return Answers(predicted, labels, tensors["places"], hidden=hidden)

        answers = self._answers[stream] = ask(nullcontext)
        answers.rows = tensors.get("row")
        if stream in self.references:
            answers.reference = self.references[stream].to(labels.device)[answers.rows]
        if stream in self.top_k:
            parts = [self.top_k[stream][n] for n in tensors.get("rows") or answers.rows.tolist()]
            answers.top_k = TopK.cat(parts).to(labels.device)
        if self.theta0 is not None:
            answers.run_theta0 = partial(ask, self.theta0)
        return answers

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)

    def mean(
        self,
        stream: str,
        values: Tensor,
        what: str = "values",
        by_token: bool = False,
        skipped: int = 0,
    ) -> Tensor:
        """Weighted sum of (B,) values, one for each row of a stream.

        Averaged over ranks and micro-batches, it is the mean over the rows of the global batch. If
        ``by_token``, values are means over a row's answer tokens except the first ``skipped``, and
        the result is the mean over all those tokens.

        Raises:
            WagleError: naming ``what``, if the values have another shape.
        """
        weight = self.batch[stream]["weight"]
        wanted = f"one number for each of {len(weight)} rows, shape {tuple(weight.shape)}"
        if not isinstance(values, Tensor):
            raise WagleError(f"{what}: must be a tensor, {wanted}, got {type(values).__name__}")
        if values.shape != weight.shape:
            raise WagleError(f"{what}: must be {wanted}, got shape {tuple(values.shape)}")
        weight = weight.to(values.dtype)
        if by_token:
            labels = self.batch[stream]["labels"]
            length = (labels[:, 1:] != IGNORE).sum(-1).to(values.dtype)
            mean = self.batch[stream].get("mean_tokens", length.mean())
            weight = weight * (length - skipped).clamp(min=0) / (mean - skipped).clamp(min=1e-6)
        return (weight * values.masked_fill(weight == 0, 0.0)).sum()


# -- what θ₀ says ----------------------------------------------------------------------------------


class TopK(NamedTuple):
    """The k most probable tokens at each of N answer tokens at θ₀; the rest as one bucket.

    The true token is always the first of the k. A divergence KL(π₀ ‖ π) over the k + 1 buckets is
    the full one minus t₀ · KL of the two predictions *within* the rest, where t₀ is the probability
    of the rest at θ₀ (the chain rule of the divergence): a lower bound.
    """

    ids: Tensor  # (N, k) int32 tokens
    logprobs: Tensor  # (N, k) fp32, their log-probabilities
    tail: Tensor  # (N,) fp32, log-probability of all other tokens together

    @classmethod
    def of(cls, predicted: Predictions, targets: Tensor, k: int) -> TopK:
        """The top k, at most V − 1, of predictions of the true tokens ``targets``, (N,)."""
        k = min(k, predicted.vocabulary - 1)

        def top(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = logits.log_softmax(-1)
            ids = logprobs.scatter(1, true[:, None], 1.0).topk(k, -1).indices  # the true one first
            return ids.int(), logprobs.gather(1, ids), _outside(logprobs, ids)

        return cls(*in_chunks(top, predicted, targets))

    @classmethod
    def cat(cls, parts: Iterable[TopK]) -> TopK:
        """The answer tokens of all parts, in this order."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def split(self, lengths: list[int]) -> list[TopK]:
        """Parts of these numbers of answer tokens."""
        return [TopK(*part) for part in zip(*(t.split(lengths) for t in self), strict=True)]

    def to(self, device: torch.device | str) -> TopK:
        return TopK(*(tensor.to(device) for tensor in self))

    def align(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`Answers.beside_theta0` gives its function, for (N, V) logits of now."""
        logprobs, ids = logits.log_softmax(-1), self.ids.long()
        reference = torch.cat([self.logprobs, self.tail[:, None]], -1)
        current = torch.cat([logprobs.gather(1, ids), _outside(logprobs, ids)[:, None]], -1)
        return reference, current, ids.new_zeros(len(ids))


def _outside(logprobs: Tensor, ids: Tensor) -> Tensor:
    """(N,) log-probability of all tokens except ``ids``, without cancellation."""
    others = logprobs.scatter(1, ids, -torch.inf)
    none = (others == -torch.inf).all(-1)  # where logsumexp has no gradient
    return others.masked_fill(none[:, None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)


class References:
    """Sums and top k of a run, computed before its first step and kept in checkpoints."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # stream -> (rows,) summed log-probabilities at θ₀
        self.top_k: dict[str, list[TopK]] = {}  # stream -> predictions at θ₀ of each row
        self._stored: dict[str, dict[str, Any]] = {}
        self._resumed = False

    def prepare(
        self, module: LanguageModule, sums: Collection[str], top_k: Collection[str], k: int
    ) -> None:
        """Take the sums and the top k of some streams from the checkpoint, or compute them.
        Collective.

        Raises:
            WagleError: if a checkpoint has those of other data, or none although θ₀ is gone.
        """
        for stream in sums:
            tensors = self._tensors(module, stream, "sum", _sums)
            self.sums[stream] = tensors["logprobs"].to(module.device)
        for stream in top_k:
            tensors = self._tensors(module, stream, f"top {k} of rows", partial(_top_k, k=k))
            together = TopK(*(tensors[name] for name in TopK._fields))
            self.top_k[stream] = together.split(tensors["lengths"].tolist())

    def _tensors(
        self, module: LanguageModule, stream: str, kind: str, compute: Compute
    ) -> dict[str, Tensor]:
        key, name = _digest(module, stream, kind), f"{stream} {kind}"
        if name not in self._stored:
            if self._resumed:
                raise WagleError(
                    f"the checkpoint has no reference log-probabilities of the {stream} rows, and "
                    "the model has moved since: start the run anew"
                )
            self._stored[name] = {"key": key, "tensors": compute(module, stream)}
        elif self._stored[name]["key"] != key:
            raise WagleError(
                f"the checkpoint's reference probabilities of the {stream} rows are of other data, "
                "another model or precision: resume with what the run began with"
            )
        return self._stored[name]["tensors"]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was used, by stream and kind, so that a resumed run does not need θ₀."""
        return self._stored

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Restore a checkpoint's; nothing is computed from then on: the weights have moved."""
        self._stored = dict(state)
        self._resumed = True


def _sums(module: LanguageModule, stream: str) -> dict[str, Tensor]:
    """``logprobs``, (rows,) float32: summed per row, at the current weights. Collective."""
    sums = _of_rows(module, stream, lambda answers: answers.logprob.tolist())
    return {"logprobs": torch.tensor(sums)}


def _top_k(module: LanguageModule, stream: str, k: int) -> dict[str, Tensor]:
    """Fields of :class:`TopK` at the current weights, for all answers, and the ``lengths`` of
    these, on the CPU. Collective."""

    def of_batch(answers: Answers) -> list[TopK]:
        together = TopK.of(answers.predicted, answers.targets, k).to("cpu")
        return together.split(answers.length.tolist())

    rows = _of_rows(module, stream, of_batch)
    lengths = torch.tensor([len(row.tail) for row in rows])
    return {**TopK.cat(rows)._asdict(), "lengths": lengths}


def _of_rows(
    module: LanguageModule, stream: str, of_batch: Callable[[Answers], list[Any]]
) -> list[Any]:
    """What ``of_batch`` returns for each row of a stream, without dropout; ranks share the rows."""
    of_row: dict[int, Any] = {}
    context = module.trainer.precision_plugin.forward_context()
    with evaluating(module.lm), torch.no_grad(), context:
        for batch in module.data.stream_loader(stream, shared=True):
            tensors = {name: tensor.to(module.device) for name, tensor in batch[stream].items()}
            values = of_batch(
                Streams({stream: tensors}, partial(forward_answers, module.lm), {})[stream]
            )
            of_row.update(zip(tensors["row"].tolist(), values, strict=True))
    of_row = dict(distributed.all_gather(of_row.items()))
    return [of_row[row] for row in range(len(of_row))]


def _digest(module: LanguageModule, stream: str, kind: str) -> str:
    """A hash of what a stream's predictions depend on: model, precision, and the rows' tokens."""
    tokens: dict[int, str] = {}
    for batch in module.data.stream_loader(stream):
        columns = (batch[stream][c] for c in ("row", "input_ids", "labels", "attention_mask"))
        for row, ids, labels, mask in zip(*columns, strict=True):
            tokens[int(row)] = json.dumps([ids[mask > 0].tolist(), labels[mask > 0].tolist()])
    text = f"{module.model_fingerprint} {stream} {module.trainer.precision} {kind}"
    text += "".join(tokens[row] for row in range(len(tokens)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
